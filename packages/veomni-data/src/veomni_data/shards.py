"""The virtual shards of an epoch: fixed parts of its order, each of which gives one row a step.

There are as many as rows in a step, whatever the number of ranks, workers and micro-batches, so that none of these
changes which samples a step is made of, and a state saved by N ranks is that of any M.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .collators import Sample
from .errors import DataError
from .packing import PackingBuffer, sample_length

ShardState = dict[str, Any]  # {"shard", "cursor", "piece": int, "buffer": [[index, piece], ...]}
Order = npt.NDArray[np.int64]


class Item(NamedTuple):
    """A sample on its way into a row."""

    position: int  # in the dataset
    piece: int  # which of the samples that dataset[position] gives
    sample: Sample


class Example(NamedTuple):
    """What dataset[position] gave: its samples, or the message of the DataError that it raised."""

    position: int
    samples: list[Sample]
    error: str | None = None


def epoch_order(samples: int, seed: int, epoch: int) -> Order:
    """The dataset indices in the order of an epoch; shard s of V takes `order[s::V]`."""
    return np.random.default_rng((seed, epoch)).permutation(samples)


def fresh_state(shard: int) -> ShardState:
    """The state of a shard at the beginning of an epoch."""
    return {"shard": shard, "cursor": 0, "piece": 0, "buffer": []}


class VirtualShard:
    """Turns the examples of its part of an epoch into rows, one after the other, in its own order.

    Args:
        order: the dataset indices of this part.
        state: where to go on; the samples that were held back then are to be given by `refill` first.
        capacity: the most tokens of a sample, and of a row if packed.
        buffer_size: samples that packing chooses from; None = each row is one sample.
    """

    def __init__(self, order: Order, state: ShardState, capacity: int, buffer_size: int | None) -> None:
        self.number: int = state["shard"]
        self.cursor: int = state["cursor"]  # the example in `order` that is put next
        self.asked = self.cursor  # the example that is to be asked for next
        self._order = order
        self._capacity = capacity
        self._piece: int = state["piece"]  # samples of that example that are put already
        self._arrived: deque[Example] = deque()  # those from `cursor` on that are here
        self._held: list[tuple[int, int]] = [(index, piece) for index, piece in state["buffer"]]
        self._buffer: PackingBuffer[Item] | None = None
        if buffer_size is not None:
            self._buffer = PackingBuffer(capacity, buffer_size, length=_item_length)

    def state_dict(self) -> ShardState:
        """What is put and what is held back, however far ahead examples were asked for."""
        held = self._held
        if self._buffer is not None:
            held = [(item.position, item.piece) for item in self._buffer.state_dict()["samples"]]
        buffer = [[index, piece] for index, piece in held]
        return {"shard": self.number, "cursor": self.cursor, "piece": self._piece, "buffer": buffer}

    @property
    def exhausted(self) -> bool:
        """Whether every example has been asked for."""
        return self.asked == len(self._order)

    @property
    def ahead(self) -> int:
        """Examples and samples asked for and not yet in a row."""
        return self.asked - self.cursor + (len(self._buffer) if self._buffer is not None else 0)

    def ask(self) -> int:
        """The dataset index of the example that is needed next."""
        self.asked += 1
        return int(self._order[self.asked - 1])

    def held_indices(self) -> list[int]:
        """The dataset indices that `refill` needs."""
        return list(dict.fromkeys(index for index, _ in self._held))

    def refill(self, examples: Sequence[Example]) -> None:
        """Hold back again the samples that were held back when the state was saved, from these examples."""
        samples = {example.position: _samples(example) for example in examples}
        items = [self._item(samples[index], index, piece) for index, piece in self._held]
        if self._buffer is not None:
            self._buffer.load_state_dict({"samples": items})

    def arrive(self, example: Example) -> None:
        """Take in the next example that was asked for."""
        self._arrived.append(example)

    def next_row(self, wait: Callable[[], None]) -> list[Item] | None:
        """The next row; None if this part of the epoch is used up. Calls `wait` until an example has arrived.

        Raises:
            DataError: an example of this row is broken or does not fit.
        """
        while self.cursor < len(self._order):
            while not self._arrived:
                wait()
            example = self._arrived[0]
            samples, row = _samples(example), None
            if self._piece < len(samples):
                row = self._put(self._item(samples, example.position, self._piece))
                self._piece += 1
            if self._piece >= len(samples):
                self._arrived.popleft()
                self.cursor += 1
                self._piece = 0
            if row is not None:
                return row
        return self._buffer.pop_row() if self._buffer is not None else None

    def _put(self, item: Item) -> list[Item] | None:
        return [item] if self._buffer is None else self._buffer.put(item)

    def _item(self, samples: list[Sample], index: int, piece: int) -> Item:
        if piece >= len(samples):
            raise DataError(f"sample {index} of the dataset is not what it was when the state was saved")
        length = sample_length(samples[piece])
        if not 1 <= length <= self._capacity:
            raise DataError(f"sample {index} has {length} tokens: it must have 1 to max_seq_len={self._capacity}")
        return Item(index, piece, samples[piece])


def count_rows(lengths: Sequence[int], order: Order, state: ShardState, capacity: int, buffer_size: int | None) -> int:
    """How many rows a shard will give from a state on, where dataset[i] is one sample of `lengths[i]` tokens."""
    shard = VirtualShard(order, state, capacity, buffer_size)
    tokens = range(capacity + 1)  # stands for a sample: slicing costs nothing, and only its length counts

    def example(index: int) -> Example:
        return Example(index, [{"input_ids": tokens[: lengths[index]]}])

    shard.refill([example(index) for index in shard.held_indices()])
    rows = 0
    while shard.next_row(lambda: shard.arrive(example(shard.ask()))) is not None:
        rows += 1
    return rows


def _samples(example: Example) -> list[Sample]:
    if example.error is not None:
        raise DataError(example.error)
    return example.samples


def _item_length(item: Item) -> int:
    return sample_length(item.sample)
