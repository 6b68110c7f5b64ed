"""The loader: for each optimizer step, the list of its micro-batches on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader as TorchDataLoader

from .collators import Batch, PackingCollator, PaddingCollator, Sample
from .errors import DataError
from .shards import Example, Item, ShardState, VirtualShard, count_rows, epoch_order, fresh_state

_WORKER_CHUNK = 8  # examples that a worker encodes before it sends them: one message each would cost more than packing

Collate = Callable[[list[Sample]], Batch]


def build_dataloader(
    dataset: Sequence[Any],
    *,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    global_batch_size: int,
    max_seq_len: int,
    packing: bool = True,
    buffer_size: int = 200,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    collate: Collate | None = None,
    seed: int = 0,
    drop_last: bool = True,
    group: Any = None,
) -> DataLoader:
    """A loader whose steps do not depend on the number of ranks, workers or micro-batches.

    A step has `global_batch_size` rows over all data-parallel ranks; a row is up to `max_seq_len` tokens of samples if
    `packing`, else one sample. Row s comes from the s-th of `global_batch_size` fixed parts of the epoch's order; each
    rank has a block of them, and `micro_batch_size` rows make a micro-batch.

    Args:
        dataset: `dataset[i]` is a sample `{"input_ids", "labels", ...}` (lists or 1-D tensors) or a list of samples.
        dp_rank, dp_size: place among the data-parallel ranks; sequence-parallel ranks of one row share it.
        buffer_size: samples of each row's part that packing chooses from.
        num_workers, prefetch_factor: processes that do nothing but `dataset[i]`, and how many lots of 8 each is ahead.
        collate: makes a batch of the samples of a micro-batch, of none too (a rank that has run dry); None is
            PackingCollator if packing, else PaddingCollator.
        seed: of the order, with the epoch.
        drop_last: end the epoch at the first step for which a row is missing; else no sample is left out, and rows that
            are missing are missing from the batches.
        group: a process group over the data-parallel ranks, by which they agree at every step that it is not the last
            and that no rank has met a DataError (which is then raised on all). Needed with more than one rank unless
            `dataset` is a list of samples, of which each rank can count the steps.

    Raises:
        DataError: sizes that do not divide, too few samples for one step, or a missing group.
    """
    if not 0 <= dp_rank < dp_size:
        raise DataError(f"dp_rank={dp_rank} is not one of dp_size={dp_size} ranks")
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (dp_size * micro_batch_size):
        raise DataError(
            f"global_batch_size={global_batch_size} is not a multiple of dp_size * micro_batch_size = "
            f"{dp_size} * {micro_batch_size} = {dp_size * micro_batch_size}"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(f"the dataset, a {type(dataset).__name__}, must have a length and random access")
    if len(dataset) < (global_batch_size if drop_last else 1):
        raise DataError(
            f"the dataset has {len(dataset)} samples, too few for a step of global_batch_size={global_batch_size}"
            + (" (drop_last=False makes an incomplete one)" if len(dataset) else "")
        )
    if group is not None and dist.get_world_size(group) != dp_size:
        raise DataError(f"group has {dist.get_world_size(group)} ranks but dp_size={dp_size}")
    if dp_size > 1 and group is None and not _is_list_of_samples(dataset):
        raise DataError(
            f"dp_size={dp_size} ranks cannot know when the others run out of samples: give `group`, a process group "
            f"over the data-parallel ranks"
        )
    return DataLoader(
        dataset,
        shards=range(dp_rank * global_batch_size // dp_size, (dp_rank + 1) * global_batch_size // dp_size),
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        max_seq_len=max_seq_len,
        buffer_size=buffer_size if packing else None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        collate=collate or (PackingCollator() if packing else PaddingCollator()),
        seed=seed,
        drop_last=drop_last,
        group=group,
    )


class DataLoader:
    """Iterates the steps of an epoch: each is the list of this rank's micro-batches. Made by `build_dataloader`.

    Each iteration is the next epoch; `set_epoch` chooses another. `len()` is the number of steps of the epoch where it
    can be counted (the dataset is a list of samples), else a TypeError.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        *,
        shards: range,
        micro_batch_size: int,
        global_batch_size: int,
        max_seq_len: int,
        buffer_size: int | None,
        num_workers: int,
        prefetch_factor: int,
        collate: Collate,
        seed: int,
        drop_last: bool,
        group: Any,
    ) -> None:
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self._numbers = shards
        self._micro_batch_size = micro_batch_size
        self._max_seq_len = max_seq_len
        self._buffer_size = buffer_size
        self._collate = collate
        self._seed = seed
        self._drop_last = drop_last
        self._group = group
        self._epoch = 0  # of the iteration that is under way, or of the next
        self._step = 0  # steps of it that are made
        self._start: list[ShardState] | None = None  # of all shards, where that iteration begins; None: at the first
        self._start_step = 0
        self._steps: int | None = None  # of the epoch, once counted
        self._shards: list[VirtualShard] | None = None  # of the iteration that is under way
        self._requests = _Requests(_WORKER_CHUNK if num_workers else 1)
        self._stream = TorchDataLoader(
            _Examples(dataset, on_wire=num_workers > 0),
            sampler=self._requests,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(seed),  # the seed of workers is not drawn from the global generator
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        if self._shards is not None:  # an iteration was left before its end
            self.set_epoch(self._epoch + 1)
        shards = self._shards = self._begin()
        self._requests.shards, self._requests.wanted = shards, None
        arrivals = (_from_wire(arrived) for chunk in self._stream for arrived in chunk)
        self._refill(shards, arrivals)

        def wait() -> None:
            number, example = next(arrivals)
            shards[number - self._numbers.start].arrive(example)

        while True:
            if self._shards is not shards:
                raise RuntimeError("this iteration is over: the loader was iterated or set anew since it began")
            rows: list[list[Item] | None] = []
            error: str | None = None  # not the exception: with its traceback it would keep this frame and the workers
            try:
                for shard in shards:
                    self._requests.wanted = shard
                    rows.append(shard.next_row(wait))
            except DataError as broken:
                error = str(broken)
            if not self._goes_on(rows, error):
                break
            self._step += 1
            yield [
                self._collate([item.sample for row in rows[i : i + self._micro_batch_size] for item in row or ()])
                for i in range(0, len(rows), self._micro_batch_size)
            ]
        self.set_epoch(self._epoch + 1)

    def __len__(self) -> int:
        if not _is_list_of_samples(self.dataset):
            raise TypeError("the number of steps is not known before the samples are encoded")
        if self._steps is None:
            lengths = [len(sample["input_ids"]) for sample in self.dataset]
            order = epoch_order(len(lengths), self._seed, self._epoch)
            size = self.global_batch_size
            starts = self._start or [fresh_state(number) for number in range(size)]
            rows = [
                count_rows(lengths, order[state["shard"] :: size], state, self._max_seq_len, self._buffer_size)
                for state in starts
            ]
            self._steps = self._start_step + (min(rows) if self._drop_last else max(rows))
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch, from its beginning, unless a loaded state goes on within it."""
        if self._shards is None and epoch == self._epoch:
            return
        self._epoch, self._step, self._start_step = epoch, 0, 0
        self._start = self._steps = self._shards = None

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the last step that it was given: a few plain values, JSON-able."""
        if self._shards is not None:
            shards = [shard.state_dict() for shard in self._shards]
        elif self._start is not None:
            shards = [self._start[number] for number in self._numbers]
        else:
            shards = [fresh_state(number) for number in self._numbers]
        return {
            "epoch": self._epoch,
            "step": self._step,
            "seed": self._seed,
            "global_batch_size": self.global_batch_size,
            "samples": len(self.dataset),
            "shards": shards,
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where the ranks stood that saved these states, however many they were.

        Args:
            states: the `state_dict()` of each of them, in any order.

        Raises:
            DataError: a state is missing or twice there, they are not of one step, or they were saved for another
                `global_batch_size`, `seed` or number of samples.
        """
        if isinstance(states, Mapping) or not states:
            raise DataError("load_state_dict needs the list of the states of all ranks that saved")
        ours = {"seed": self._seed, "global_batch_size": self.global_batch_size, "samples": len(self.dataset)}
        for state in states:
            for key, value in ours.items():
                if state[key] != value:
                    raise DataError(f"the loader was saved with {key}={state[key]} but is loaded with {key}={value}")
            for key in ("epoch", "step"):
                if state[key] != states[0][key]:
                    raise DataError(f"the states are not of one step: {key} is {states[0][key]} and {state[key]}")
        shards = sorted((shard for state in states for shard in state["shards"]), key=lambda shard: shard["shard"])
        if [shard["shard"] for shard in shards] != list(range(self.global_batch_size)):
            raise DataError(
                f"the {len(states)} states hold {len(shards)} rows' parts of the epoch, not each of the "
                f"{self.global_batch_size} once: give the states of all ranks that saved"
            )
        self._epoch = states[0]["epoch"]
        self._step = self._start_step = states[0]["step"]
        self._start, self._steps, self._shards = shards, None, None

    def _begin(self) -> list[VirtualShard]:
        if self._group is None and len(self._numbers) < self.global_batch_size:
            len(self)  # counted from where the iteration begins
        order = epoch_order(len(self.dataset), self._seed, self._epoch)
        starts = self._start or [fresh_state(number) for number in range(self.global_batch_size)]
        size = self.global_batch_size
        return [
            VirtualShard(order[number::size].copy(), starts[number], self._max_seq_len, self._buffer_size)
            for number in self._numbers
        ]

    def _refill(self, shards: list[VirtualShard], arrivals: Iterator[tuple[int, Example]]) -> None:
        """Encode again what the shards held back when their state was saved: `_Requests` asks for it first."""
        for shard in shards:
            shard.refill([next(arrivals)[1] for _ in shard.held_indices()])

    def _goes_on(self, rows: list[list[Item] | None], error: str | None) -> bool:
        """Whether all ranks make this step; raises the DataError of whichever rank has met one."""
        there = error is None and (all(rows) if self._drop_last else any(rows))
        if self._group is not None:
            there = _agree(there, error, self._drop_last, self._group)
        elif error is not None:
            raise DataError(error)
        elif len(self._numbers) < self.global_batch_size:
            there = self._step < len(self)
        return there


class _Requests:
    """What the workers are to encode, in order: decided as late as they ask, so that the neediest shard is fed first.

    Which shard that is has no influence on the batches: each has its own fixed order.
    """

    def __init__(self, chunk: int) -> None:
        self.shards: list[VirtualShard] = []
        self.wanted: VirtualShard | None = None  # its row is being waited for
        self._chunk = chunk

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        requests = self._requests()
        while chunk := list(islice(requests, self._chunk)):
            yield chunk

    def _requests(self) -> Iterator[tuple[int, int]]:
        for shard in self.shards:
            for index in shard.held_indices():
                yield shard.number, index
        open_shards = [shard for shard in self.shards if not shard.exhausted]
        while open_shards:
            wanted = self.wanted
            starving = wanted is not None and not wanted.exhausted and wanted.asked == wanted.cursor
            shard = wanted if wanted is not None and starving else min(open_shards, key=_ahead)
            yield shard.number, shard.ask()
            if shard.exhausted:
                open_shards.remove(shard)


def _ahead(shard: VirtualShard) -> int:
    return shard.ahead


class _Examples:
    """`dataset[index]` as a list of samples or the DataError that it raised, for each shard that asked."""

    def __init__(self, dataset: Sequence[Any], on_wire: bool) -> None:
        self._dataset = dataset
        self._on_wire = on_wire

    def __getitem__(self, requests: list[tuple[int, int]]) -> list[tuple[int, Example]]:
        return [(number, self._encode(index)) for number, index in requests]

    def _encode(self, index: int) -> Example:
        try:
            # an exception that leaves a worker arrives as one of many lines, a value as it is
            samples = _as_samples(self._dataset[index], index)
        except DataError as error:
            return Example(index, [], str(error))
        return Example(index, [_to_wire(s) for s in samples] if self._on_wire else samples)


def _as_samples(given: Any, index: int) -> list[Sample]:
    samples = given if isinstance(given, list) else [given]
    for sample in samples:
        if not isinstance(sample, Mapping) or "input_ids" not in sample:
            what = sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__
            raise DataError(f'sample {index} of the dataset has no "input_ids" ({what}): its transform must make them')
    return samples


class _Wire(tuple[Any, ...]):
    """A tensor as (bytes, dtype, shape): sent as a tensor, each one that is held back would keep a file open."""


def _to_wire(sample: Sample) -> Sample:
    return {
        key: _Wire((value.contiguous().reshape(-1).view(torch.uint8).numpy(), value.dtype, tuple(value.shape)))
        if isinstance(value, Tensor)
        else value
        for key, value in sample.items()
    }


def _from_wire(arrived: tuple[int, Example]) -> tuple[int, Example]:
    number, example = arrived
    samples = [{key: _from_bytes(value) for key, value in sample.items()} for sample in example.samples]
    return number, example._replace(samples=samples)


def _from_bytes(value: Any) -> Any:
    if not isinstance(value, _Wire):
        return value
    data, dtype, shape = value
    return torch.from_numpy(np.require(data, requirements="W")).view(dtype).reshape(shape)


def _as_it_is(value: Any) -> Any:
    return value


def _is_list_of_samples(dataset: Any) -> bool:
    """Whether lengths are known without encoding: there is no transform behind a list."""
    return isinstance(dataset, (list, tuple)) and isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]


def _agree(there: bool, error: str | None, drop_last: bool, group: Any) -> bool:
    """Whether every rank (`drop_last`) or any has rows; one small all-reduce. An error on a rank is raised on all."""
    vote = 2 if error is not None else int(there != drop_last)  # 1 = a rank that decides: it has none, or it has some
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    votes = torch.tensor(vote, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    highest = int(votes)
    if highest == 2:
        errors: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=group)
        raise DataError(error or next(text for text in errors if text is not None))
    return (highest == 1) != drop_last
