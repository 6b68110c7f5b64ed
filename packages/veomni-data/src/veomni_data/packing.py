"""Samples into rows of a token budget: `pack` for a whole list, `PackingBuffer` for a stream."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from .errors import DataError

S = TypeVar("S")


def pack(lengths: Sequence[int], capacity: int, *, costs: Sequence[float] | None = None) -> list[list[int]]:
    """Best-fit decreasing over a whole list: every index of `lengths` in exactly one row.

    A row starts with the largest length left and takes the largest that still fits until none does.

    Args:
        lengths: tokens of each sample, 1 to `capacity`.
        capacity: tokens of a row.
        costs: the work of each sample in any unit, above 0, such as `attention_cost` gives. Then most rows cost the
            same, and they come in the order of their cost, so that rows that are dealt to ranks in turn make steps of
            equal work; there are at most 0.5 % more of them.

    Returns:
        The indices of each row; the lengths of a row sum to at most `capacity`.

    Raises:
        DataError: a length is below 1 or above `capacity`, or there is not a cost above 0 for each.
    """
    if costs is not None:
        from .balance import pack_balanced  # which is built on this module

        return pack_balanced(lengths, capacity, costs)
    array = np.asarray(lengths, dtype=np.int64)
    if array.size == 0:
        return []
    order = np.argsort(array, kind="stable")
    if array[order[0]] < 1 or array[order[-1]] > capacity:
        index = int(order[0] if array[order[0]] < 1 else order[-1])
        raise DataError(f"sample {index} has {array[index]} tokens: it must have 1 to {capacity} to fit a row")
    distinct, starts = np.unique(array[order], return_index=True)
    indices: list[int] = order.tolist()
    left: list[int] = distinct.tolist()  # the distinct lengths that still have samples, ascending
    begins: list[int] = starts.tolist()  # where the samples of left[i] begin in `indices`
    ends: list[int] = [*begins[1:], array.size]  # and where those that are left end
    rows: list[list[int]] = []
    while left:
        row: list[int] = []
        room, at = capacity, len(left) - 1
        while at >= 0:
            length, end, begin = left[at], ends[at], begins[at]
            if room < 2 * length:  # the usual case of long samples, without slices
                end -= 1
                row.append(indices[end])
                room -= length
            else:
                take = min(room // length, end - begin)
                row += indices[end - take : end]
                end -= take
                room -= take * length
            if end == begin:
                del left[at], begins[at], ends[at]
            else:
                ends[at] = end
            at = bisect_right(left, room, 0, at) - 1 if room else -1
        rows.append(row)
    return rows


def sample_length(sample: Any) -> int:
    """Tokens of a sample: the length of its `input_ids`, a list or a 1-D tensor."""
    return len(sample["input_ids"])


class PackingBuffer(Generic[S]):
    """Packs a stream: holds back up to `buffer_size` samples so that rows can be filled well.

    Each row starts with the oldest sample, so that none waits for ever, and goes on with the largest that still fits.
    A row is given once `buffer_size` samples are held and they fill it; until then more samples are taken in.

    Args:
        capacity: what a row holds, in the unit of `length`: tokens, unless `length` counts something else.
        buffer_size: samples to choose from.
        length: what a sample takes of a row's capacity, 1 to `capacity`; tokens, or for example its targets.
        tokens, max_tokens: a second limit for where `length` does not count tokens: the tokens of a sample, and the
            most of them in a row.
    """

    # (length, arrival) as one integer keeps the sorted list a list of ints: bisect and insort stay in C
    _ARRIVALS = 1 << 48

    def __init__(
        self,
        capacity: int,
        buffer_size: int,
        *,
        length: Callable[[S], int] = sample_length,
        tokens: Callable[[S], int] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if capacity < 1 or buffer_size < 1:
            raise ValueError(f"capacity={capacity} and buffer_size={buffer_size} must be at least 1")
        if (tokens is None) != (max_tokens is None):
            raise ValueError("tokens and max_tokens are one limit: give both or neither")
        self.capacity = capacity
        self.buffer_size = buffer_size
        self.max_tokens = max_tokens
        self._length = length
        self._tokens = tokens
        self._clear()

    def _clear(self) -> None:
        self._keys: list[int] = []  # length * _ARRIVALS - arrival, ascending: among equals the oldest is last
        self._samples: dict[int, S] = {}  # by arrival
        self._arrivals: deque[int] = deque()  # oldest first; those that are gone from _samples are skipped
        self._next_arrival = 0
        self._held_length = 0
        self._held_tokens = 0  # 0 without max_tokens

    def __len__(self) -> int:
        return len(self._samples)

    def put(self, sample: S, capacity: int | None = None) -> list[S] | None:
        """Take in a sample; returns a finished row, oldest sample first, or None.

        Args:
            capacity: of this row, if it differs from that of the buffer (see `pop_row`).

        Raises:
            DataError: the sample has no token or more than a row holds.
        """
        self._hold(sample)
        return self.pop_row(capacity) if self._is_ready(capacity) else None

    def pop_row(self, capacity: int | None = None) -> list[S] | None:
        """A row from what is held, however little that is; None if nothing is.

        Args:
            capacity: of this row, at most that of the buffer; the oldest sample begins the row even if it is longer.
                `max_tokens` becomes less in the same ratio.
        """
        if not self._samples:
            return None
        capacity = self.capacity if capacity is None else capacity
        arrivals, keys, big = self._arrivals, self._keys, self._ARRIVALS
        arrival = arrivals.popleft()
        while arrival not in self._samples:
            arrival = arrivals.popleft()
        first = self._samples.pop(arrival)
        length = self._length(first)
        del keys[bisect_right(keys, length * big - arrival) - 1]
        row, room = [first], capacity - length
        if self.max_tokens is None:
            while room > 0 and (at := bisect_right(keys, room * big)):
                key = keys.pop(at - 1)
                arrival = -key % big
                row.append(self._samples.pop(arrival))
                room -= (key + arrival) // big
        else:
            room = self._fill_within_tokens(row, room, self._token_limit(capacity))
        self._held_length -= capacity - room
        return row

    def flush(self) -> list[list[S]]:
        """All rows that the held samples make; the buffer is empty afterwards."""
        rows = []
        while (row := self.pop_row()) is not None:
            rows.append(row)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What is held, as `{"samples": [...]}`, oldest first."""
        return {"samples": list(self._samples.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold exactly the samples of a saved state: the rows to come are those that would have come."""
        self._clear()
        for sample in state["samples"]:
            self._hold(sample)

    def _token_limit(self, capacity: int) -> int:
        assert self.max_tokens is not None
        return self.max_tokens * capacity // self.capacity

    def _fill_within_tokens(self, row: list[S], room: int, limit: int) -> int:
        """Fill up a row, of which the first sample is there, within both limits; returns the room that is left."""
        assert self._tokens is not None
        keys, big = self._keys, self._ARRIVALS
        tokens = self._tokens(row[0])
        at = bisect_right(keys, room * big) if room > 0 else 0
        while at:
            at -= 1
            arrival = -keys[at] % big
            taken = self._tokens(self._samples[arrival])
            if tokens + taken <= limit:
                room -= (keys[at] + arrival) // big
                tokens += taken
                row.append(self._samples.pop(arrival))
                del keys[at]
                at = bisect_right(keys, room * big, 0, at) if room else 0
        self._held_tokens -= tokens
        return room

    def _is_ready(self, capacity: int | None) -> bool:
        """Whether as much is held as is wanted to choose a row from."""
        if len(self._samples) < self.buffer_size:
            return False
        capacity = self.capacity if capacity is None else capacity
        if self._held_length >= capacity:
            return True
        return self.max_tokens is not None and self._held_tokens >= self._token_limit(capacity)

    def _hold(self, sample: S) -> None:
        length, tokens = self._length(sample), 0
        if not 1 <= length <= self.capacity:
            raise DataError(f"a sample has {length} tokens: it must have 1 to {self.capacity} to fit a row")
        if self._tokens is not None and self.max_tokens is not None:
            tokens = self._tokens(sample)
            if tokens > self.max_tokens:
                raise DataError(f"a sample has {tokens} tokens: a row holds at most {self.max_tokens}")
        self._file(sample, length, tokens, self._next_arrival)
        self._samples[self._next_arrival] = sample
        self._next_arrival += 1
        self._held_length += length
        self._held_tokens += tokens

    def _file(self, sample: S, length: int, tokens: int, arrival: int) -> None:
        """Note what is needed to choose this sample later."""
        self._arrivals.append(arrival)
        insort(self._keys, length * self._ARRIVALS - arrival)
