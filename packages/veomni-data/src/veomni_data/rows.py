"""Samples on their way into rows, and by which rules they are put together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from .balance import BalancedBuffer
from .buckets import BucketBuffer
from .collators import Sample
from .lengths import count_targets
from .packing import PackingBuffer
from .source import Ref


class Item(NamedTuple):
    """A sample on its way into a row."""

    source: int
    passes: int  # of the source before this one, in the epoch
    ref: Ref
    piece: int  # which of the samples of its example
    pieces: int
    sample: Sample
    tokens: int
    size: int  # what it takes of a row: tokens or targets
    cost: float

    @property
    def key(self) -> list[Any]:
        """Where it is from, without the zeros at the end: [ref, piece, pieces - 1, source, passes]."""
        return _trimmed([self.ref, self.piece, self.pieces - 1, self.source, self.passes])


def example_key(source: int, passes: int, ref: Ref) -> list[Any]:
    """The key of an example as a whole."""
    return _trimmed([ref, 0, 0, source, passes])


def example_name(source: int, passes: int, ref: Ref) -> str:
    """An example as a key of a dict: a ref may be a list."""
    return f"{source} {passes} {ref}"


def item_place(key: Sequence[Any]) -> tuple[Ref, int, int, int, int]:
    """The ref, piece, number of pieces, source and passes of a `key`."""
    ref, piece, more, source, passes = [*key, 0, 0, 0, 0][:5]
    return ref, piece, more + 1, source, passes


Row = list[Item]


class Fault(NamedTuple):
    """An example that was skipped, or that gave nothing."""

    source: int
    passes: int
    ref: Ref
    message: str
    reason: str


class RowRules(NamedTuple):
    """How the samples of a shard become rows.

    Attributes:
        max_seq_len: the most tokens of a sample, and of a row unless targets are counted.
        buffer_size: samples that packing chooses from; None = each row is one sample.
        budget: what a row holds at a step; None = `max_seq_len`.
        max_row_tokens: the most tokens of a row where its targets are counted, else None.
        cost: the work of a sample, which the rows of a step are to have equal parts of.
        bucket: what the samples of a row have in common.
    """

    max_seq_len: int
    buffer_size: int | None
    budget: Callable[[int], int] | None = None
    max_row_tokens: int | None = None
    cost: Callable[[Sample], float] | None = None
    bucket: Callable[[Sample], Hashable] | None = None

    def buffer(self) -> PackingBuffer[Item] | None:
        """An empty buffer of a shard."""
        if self.buffer_size is None:
            return None
        limits: dict[str, Any] = {"length": _item_size}
        if (bucket := self.bucket) is not None:
            return BucketBuffer(self.max_seq_len, self.buffer_size, bucket=lambda i: bucket(i.sample), **limits)
        if self.max_row_tokens is not None:
            limits |= {"tokens": _item_tokens, "max_tokens": self.max_row_tokens}
        if self.cost is not None:
            return BalancedBuffer(self.max_seq_len, self.buffer_size, cost=_item_cost, **limits)
        return PackingBuffer(self.max_seq_len, self.buffer_size, **limits)

    def capacity(self, step: int) -> int:
        """What a row holds at a step of the run."""
        if self.budget is None:
            return self.max_seq_len
        return min(max(int(self.budget(step)), 1), self.max_seq_len)

    def item(self, samples: Sequence[Sample], piece: int, source: int, passes: int, ref: Ref) -> Item:
        """A sample with what rows are made by."""
        sample = samples[piece]
        tokens = len(sample["input_ids"])
        size = tokens if self.max_row_tokens is None else max(1, count_targets(sample))
        cost = 0.0 if self.cost is None else float(self.cost(sample))
        return Item(source, passes, ref, piece, len(samples), sample, tokens, size, cost)


def _trimmed(values: list[Any]) -> list[Any]:
    while len(values) > 1 and values[-1] == 0:
        values.pop()
    return values


def _item_size(item: Item) -> int:
    return item.size


def _item_tokens(item: Item) -> int:
    return item.tokens


def _item_cost(item: Item) -> float:
    return item.cost
