"""An example as it is read into the samples that rows are made of: what worker processes do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .collators import IGNORED_LABEL, Sample
from .errors import DataError
from .lengths import TooLong, fit_sample
from .source import Ref, Source


class Request(NamedTuple):
    """An example that is to be encoded."""

    source: int
    ref: Ref
    raw: Any


class Example(NamedTuple):
    """What an example gave: its samples, or what is wrong with it."""

    samples: list[Sample]
    fault: tuple[str, str] | None = None  # the message and reason of a DataError
    fate: str | None = None  # "dropped", "truncated" or "split" if it was too long


@dataclass(frozen=True)
class Encoder:
    """Makes examples of requests.

    Attributes:
        sources: that requests name by number.
        needed: the keys, of a value a token, that a sample must have.
        max_seq_len, too_long: the most tokens of a sample, and what becomes of longer ones.
    """

    sources: Sequence[Source]
    needed: tuple[str, ...]
    max_seq_len: int
    too_long: TooLong

    def __call__(self, request: Request) -> Example:
        """The samples of an example; a DataError becomes a value, any other exception names the example."""
        source = self.sources[request.source]
        try:
            try:
                given = source.encode(request.raw)
                samples = given if isinstance(given, list) else [given]
                if faulty := next(filter(None, map(self._fault, samples)), None):
                    raise DataError(f"{source.place(request.ref)}: {faulty}")
                if samples and "labels" in self.needed and all(_all_masked(sample["labels"]) for sample in samples):
                    raise DataError(
                        f"{source.place(request.ref)}: all labels are {IGNORED_LABEL}", reason="nothing to learn"
                    )
                if all(len(sample["input_ids"]) <= self.max_seq_len for sample in samples):
                    return Example(samples)
                return self._fit(samples, source, request.ref)
            except DataError as error:
                return Example([], (str(error), error.reason))
        except Exception as error:
            error.add_note(f"while encoding {source.place(request.ref)}")
            raise

    def _fault(self, sample: Any) -> str | None:
        if not isinstance(sample, Mapping):
            return f"a {type(sample).__name__} is no sample: the transform must make a mapping with input_ids"
        for key in self.needed:
            if key not in sample:
                return f'the sample has no "{key}" but only {sorted(sample)}: the transform must make them'
            if not hasattr(sample[key], "__len__") or isinstance(sample[key], (str, bytes)):
                return (
                    f'"{key}" of the sample is a {type(sample[key]).__name__}: it must be a list or tensor of integers'
                )
            if getattr(sample[key], "ndim", 1) != 1:
                return f'"{key}" of the sample has shape {list(sample[key].shape)}: it must have one axis, [T]'
            if len(sample[key]) != len(sample["input_ids"]):
                return f'the sample has {len(sample[key])} "{key}" for {len(sample["input_ids"])} input_ids'
        return None if len(sample["input_ids"]) else "the sample has no token"

    def _fit(self, samples: list[Sample], source: Source, ref: Ref) -> Example:
        fitted: list[Sample] = []
        for sample in samples:
            try:
                fitted += fit_sample(sample, self.max_seq_len, self.too_long)
            except DataError as error:
                raise DataError(f"{source.place(ref)}: {error}", reason=error.reason) from error
        return Example(fitted, fate={"drop": "dropped", "truncate": "truncated", "split": "split"}[self.too_long])


def _all_masked(labels: Any) -> bool:
    if labels[0] != IGNORED_LABEL:  # the usual case of plain text, without a look at the rest
        return False
    if isinstance(labels, list):
        return labels.count(IGNORED_LABEL) == len(labels)
    return bool((torch.as_tensor(labels) == IGNORED_LABEL).all())


class _Wire(tuple[Any, ...]):
    """A tensor as (bytes, dtype, shape): sent as a tensor, each one that is held back would keep a file open."""


def to_wire(sample: Sample) -> Sample:
    """A sample as it is sent to another process."""
    return {
        key: _Wire((value.contiguous().reshape(-1).view(torch.uint8).numpy(), value.dtype, tuple(value.shape)))
        if isinstance(value, Tensor)
        else value
        for key, value in sample.items()
    }


def from_wire(sample: Sample) -> Sample:
    """The sample that `to_wire` was given."""
    return {key: _from_bytes(value) for key, value in sample.items()}


def _from_bytes(value: Any) -> Any:
    if not isinstance(value, _Wire):
        return value
    data, dtype, shape = value
    return torch.from_numpy(np.require(data, requirements="W")).view(dtype).reshape(shape)
