"""Rows of samples of one kind, such as pictures of one size, which are stacked rather than packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import TypeVar

from .packing import PackingBuffer, sample_length

S = TypeVar("S")


class BucketBuffer(PackingBuffer[S]):
    """A packing buffer whose rows hold samples of one bucket each.

    Each row starts with the oldest sample, so that none waits for ever, and goes on with the next of its bucket that
    fit. A row of a bucket that is rare among `buffer_size` samples may stay short.

    Args:
        bucket: what the samples of a row have in common, such as the shape of a picture.
        capacity, buffer_size, length: as in PackingBuffer.
    """

    def __init__(
        self,
        capacity: int,
        buffer_size: int,
        *,
        bucket: Callable[[S], Hashable],
        length: Callable[[S], int] = sample_length,
    ) -> None:
        self._bucket = bucket
        super().__init__(capacity, buffer_size, length=length)

    def _clear(self) -> None:
        super()._clear()
        self._buckets: dict[Hashable, deque[int]] = {}  # arrivals, oldest first

    def pop_row(self, capacity: int | None = None) -> list[S] | None:
        """A row from what is held, however little that is; None if nothing is."""
        if not self._samples:
            return None
        room = self.capacity if capacity is None else capacity
        first = next(iter(self._samples))  # the oldest
        key = self._bucket(self._samples[first])
        row: list[S] = []
        left: deque[int] = deque()
        for arrival in self._buckets.pop(key):
            length = self._length(self._samples[arrival])
            if row and length > room:
                left.append(arrival)
                continue
            row.append(self._samples.pop(arrival))
            room -= length
            self._held_length -= length
        if left:
            self._buckets[key] = left
        return row

    def _file(self, sample: S, length: int, tokens: int, arrival: int) -> None:
        self._buckets.setdefault(self._bucket(sample), deque()).append(arrival)
