"""The samples of a micro-batch into the dict of tensors that a model is called with: `model(**batch)`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Sample = dict[str, Any]
Batch = dict[str, Any]

IGNORED_LABEL = -100
TOKEN_KEYS = ("input_ids", "labels", "mm_token_type_ids")  # one value a token: joined along the row
_DUMMY_TOKENS = 4


class PackingCollator:
    """Joins samples into one row: `input_ids`, `labels`, `shift_labels`, `position_ids` int64 [1, T] (positions restart
    at each sample), `cu_seq_lens_q/k` int32 [n + 1], `max_length_q/k` int; every other tensor of the samples (such as
    `pixel_values` [n, ...]) is concatenated along dim 0.

    No sample at all gives a row of a few pad tokens without a target, so that a rank that has run dry can still take
    part in the step.

    Args:
        pad_token_id: what such a row is made of.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The row of these samples; ValueError if a sample cannot be collated, naming the key."""
        samples = _checked(samples) or [_dummy(self.pad_token_id)]
        lengths = [len(s["input_ids"]) for s in samples]
        batch: Batch = {key: torch.cat([s[key] for s in samples])[None] for key in _token_keys(samples)}
        batch["shift_labels"] = torch.cat([_shift(s["labels"]) for s in samples])[None]
        batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        batch["cu_seq_lens_q"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"].clone()
        batch["max_length_q"] = batch["max_length_k"] = max(lengths)
        return batch | _modalities(samples)


class PaddingCollator:
    """One sample a row, padded on the right to the longest: `input_ids`, `labels`, `shift_labels`, `position_ids`,
    `attention_mask` int64 [B, S]; every other tensor of the samples is concatenated along dim 0.

    No sample at all gives one row of a few pad tokens without a target.

    Args:
        pad_token_id: what `input_ids` is padded with.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The padded rows of these samples; ValueError if a sample cannot be collated, naming the key."""
        samples = _checked(samples) or [_dummy(self.pad_token_id)]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED_LABEL, "mm_token_type_ids": 0}
        batch: Batch = {key: _pad([s[key] for s in samples], fill[key]) for key in _token_keys(samples)}
        batch["shift_labels"] = _pad([_shift(s["labels"]) for s in samples], IGNORED_LABEL)
        rows, width = batch["input_ids"].shape
        batch["position_ids"] = torch.arange(width).repeat(rows, 1)
        batch["attention_mask"] = _pad([torch.ones(len(s["input_ids"]), dtype=torch.int64) for s in samples], 0)
        return batch | _modalities(samples)


def _checked(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with token lists as int64 tensors; ValueError where one cannot be collated."""
    checked = []
    for sample in samples:
        # whether a token is padding is decided here, so a mask that a tokenizer gave along is of no use
        tensors = {key: value for key, value in sample.items() if key != "attention_mask"}
        for key in ("input_ids", "labels"):
            if key not in sample:
                raise ValueError(f'a sample has no "{key}" but only {sorted(sample)}')
        for key, value in tensors.items():
            if key in TOKEN_KEYS:
                tensors[key] = torch.as_tensor(value, dtype=torch.int64)
                if tensors[key].shape != (len(sample["input_ids"]),):
                    raise ValueError(
                        f'"{key}" of a sample has shape {list(tensors[key].shape)}: it must have one value for each of '
                        f"the {len(sample['input_ids'])} input_ids"
                    )
            elif not isinstance(value, Tensor) or value.dim() == 0:
                raise ValueError(
                    f'"{key}" of a sample is a {type(value).__name__}: beside token ids only tensors that can be '
                    f"concatenated along dim 0 belong into a batch"
                )
        checked.append(tensors)
    return checked


def _dummy(pad_token_id: int) -> Sample:
    return {
        "input_ids": torch.full((_DUMMY_TOKENS,), pad_token_id, dtype=torch.int64),
        "labels": torch.full((_DUMMY_TOKENS,), IGNORED_LABEL, dtype=torch.int64),
    }


def _token_keys(samples: list[Sample]) -> list[str]:
    """The keys with a value a token that are there; a key that some samples lack raises ValueError."""
    keys = [key for key in TOKEN_KEYS if any(key in s for s in samples)]
    for key in keys:
        if not all(key in s for s in samples):
            raise ValueError(f'some samples of a micro-batch have "{key}" and some have not')
    return keys


def _shift(labels: Tensor) -> Tensor:
    """[T] -> [T]: the target of position t is label t + 1; the last position has none."""
    return torch.cat([labels[1:], labels.new_tensor([IGNORED_LABEL])])


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _modalities(samples: list[Sample]) -> Batch:
    parts: dict[str, list[Tensor]] = {}
    for sample in samples:
        for key, value in sample.items():
            if key not in TOKEN_KEYS:
                parts.setdefault(key, []).append(value)
    batch: Batch = {}
    for key, tensors in parts.items():
        if len({(t.shape[1:], t.dtype) for t in tensors}) > 1:
            shapes = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors)
            raise ValueError(f'"{key}" of the samples of a micro-batch cannot be concatenated along dim 0: {shapes}')
        batch[key] = torch.cat(tensors)
    return batch
