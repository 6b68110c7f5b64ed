"""The samples of a micro-batch into the dict of tensors that a model is called with: `model(**batch)`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DataError

Sample = dict[str, Any]
Batch = dict[str, Any]

IGNORED_LABEL = -100
_TYPES = ("mm_token_type_ids", "token_type_ids")  # which tokens are placeholders, and of what; 0 = text
TOKEN_KEYS = ("input_ids", "labels", *_TYPES)  # one value a token: joined along the row
_DUMMY_TOKENS = 4
_NUMBERS = {torch.int64, torch.float32}  # what lists of numbers become: may stand side by side
_FRAME_MASKS = ("feature_attention_mask", "input_features_mask")  # transformers' names for which frames are sound


class PackingCollator:
    """Joins samples into one row: `input_ids`, `labels`, `shift_labels`, `position_ids` int64 [1, T] (positions restart
    at each sample), `cu_seq_lens_q/k` int32 [n + 1], `max_length_q/k` int; every other tensor of the samples (such as
    `pixel_values` [n, ...]) is concatenated along dim 0.

    A sample may bring its own `position_ids`, [T], or [3, T] (time, height, width) for M-RoPE, whole or float32. The
    row's are [4, 1, T] then: first the restarting positions, without which transformers does not tell the samples of
    such a row apart.

    A sample may be a row of several already: `seq_lens`, a list of their lengths, says where they end. Sound of
    different lengths (`input_features` with a mask of the frames) is padded to the longest.

    No sample at all gives a row of a few pad tokens without a target, so that a rank that has run dry can still take
    part in the step.

    Args:
        pad_token_id: what such a row is made of.
        text_positions: False leaves the first of the four axes away, for a model that takes [3, 1, T] alone. It must
            go by `cu_seq_lens_q/k` then.
        cu_seq_lens: False leaves `cu_seq_lens_q/k` and `max_length_q/k` away, for a model that does not take them. It
            must go by `position_ids` then, and the row cannot be sliced for sequence parallelism.
    """

    def __init__(self, pad_token_id: int = 0, *, text_positions: bool = True, cu_seq_lens: bool = True) -> None:
        if not text_positions and not cu_seq_lens:
            raise ValueError("nothing would tell the samples of a row apart: text_positions and cu_seq_lens are False")
        self.pad_token_id = pad_token_id
        self.text_positions = text_positions
        self.cu_seq_lens = cu_seq_lens

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The row of these samples; DataError if a sample cannot be collated, naming the key."""
        samples = _checked(samples) or [_dummy(self.pad_token_id)]
        lengths = [length for sample in samples for length in _lengths(sample)]
        batch: Batch = {key: torch.cat([s[key] for s in samples])[None] for key in _token_keys(samples)}
        batch["shift_labels"] = _shift(batch["labels"][0], lengths)[None]
        batch["position_ids"] = _restarting(lengths)[None]
        if axes := _axes(samples):
            own = torch.cat([_positions(s, axes) for s in samples], dim=-1)[:, None]
            with_text = self.text_positions and axes > 1
            batch["position_ids"] = torch.cat([batch["position_ids"][None], own]) if with_text else own.squeeze(0)
        if self.cu_seq_lens:
            batch["cu_seq_lens_q"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"].clone()
            batch["max_length_q"] = batch["max_length_k"] = max(lengths)
        return batch | _modalities(samples)


class PaddingCollator:
    """One sample a row, padded on the right to the longest: `input_ids`, `labels`, `shift_labels`, `position_ids`,
    `attention_mask` int64 [B, S]; every other tensor of the samples is concatenated along dim 0.

    A sample may bring its own `position_ids`, [T], or [3, T] for M-RoPE: then they are [3, B, S].

    No sample at all gives one row of a few pad tokens without a target.

    Args:
        pad_token_id: what `input_ids` is padded with.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The padded rows of these samples; DataError if a sample cannot be collated, naming the key."""
        samples = _checked(samples) or [_dummy(self.pad_token_id)]
        for sample in samples:
            if len(_lengths(sample)) > 1:
                raise DataError(
                    f"a sample is a row of {len(_lengths(sample))} already (seq_lens), which padding cannot keep "
                    f"apart: collate it with PackingCollator"
                )
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED_LABEL}
        batch: Batch = {key: _pad([s[key] for s in samples], fill.get(key, 0)) for key in _token_keys(samples)}
        batch["shift_labels"] = _pad([_shift(s["labels"], _lengths(s)) for s in samples], IGNORED_LABEL)
        rows, width = batch["input_ids"].shape
        batch["position_ids"] = torch.arange(width).repeat(rows, 1)
        if axes := _axes(samples):
            positions = [_positions(s, axes).T for s in samples]
            whole = not any(p.is_floating_point() for p in positions)
            own = _pad(positions if whole else [p.float() for p in positions], 0)  # [B, S, axes]
            batch["position_ids"] = own.permute(2, 0, 1).squeeze(0)
        batch["attention_mask"] = _pad([torch.ones(len(s["input_ids"]), dtype=torch.int64) for s in samples], 0)
        return batch | _modalities(samples)


def _checked(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with tensors for lists; DataError where one cannot be collated.

    Text beside pictures: a sample that has no tensor of media has no placeholders either, and its types are all 0.
    """
    checked = []
    for sample in samples:
        # whether a token is padding is decided here, so a mask that a tokenizer gave along is of no use
        tensors = {key: value for key, value in sample.items() if key != "attention_mask"}
        for key in ("input_ids", "labels"):
            if key not in sample:
                raise DataError(f'a sample has no "{key}" but only {sorted(sample)}')
        length = len(sample["input_ids"])
        for key, value in tensors.items():
            if key == "seq_lens":
                lengths = tensors[key] = [int(n) for n in value]
                if min(lengths, default=0) < 1 or sum(lengths) != length:
                    raise DataError(f'"seq_lens" of a sample is {lengths}: its lengths must sum to {length} input_ids')
            elif key in TOKEN_KEYS or key == "position_ids":
                tensors[key] = torch.as_tensor(value)
                if key != "position_ids" or not tensors[key].is_floating_point():
                    tensors[key] = tensors[key].to(torch.int64)
                shapes = [(length,), (3, length), (4, length)] if key == "position_ids" else [(length,)]
                if tensors[key].shape not in shapes:
                    raise DataError(
                        f'"{key}" of a sample has shape {list(tensors[key].shape)}: it must have one value for each of '
                        f"the {length} input_ids" + (", or [3, T] for M-RoPE" if len(shapes) > 1 else "")
                    )
                if len(tensors[key]) == 4 and tensors[key].dim() == 2:
                    tensors[key] = tensors[key][1:]  # of a packed row: what comes first is made anew
            else:
                tensors[key] = _as_tensor(key, value)
        checked.append(tensors)
    for key in _TYPES:
        if any(key in tensors for tensors in checked):
            for tensors in checked:
                if key not in tensors and not _media_keys(tensors):
                    tensors[key] = torch.zeros_like(tensors["input_ids"])
    return checked


def _as_tensor(key: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(value)
    elif isinstance(value, (list, tuple)) and value and all(type(number) in (int, float) for number in value):
        value = torch.tensor(value)  # such as second_per_grid_ts: one number a video
    if not isinstance(value, Tensor) or value.dim() == 0:
        raise DataError(
            f'"{key}" of a sample is a {type(value).__name__}: beside token ids only tensors (or lists of numbers) '
            f"that can be concatenated along dim 0 belong into a batch"
        )
    return value


def _dummy(pad_token_id: int) -> Sample:
    return {
        "input_ids": torch.full((_DUMMY_TOKENS,), pad_token_id, dtype=torch.int64),
        "labels": torch.full((_DUMMY_TOKENS,), IGNORED_LABEL, dtype=torch.int64),
    }


def _token_keys(samples: list[Sample]) -> list[str]:
    """The keys with a value a token that are there; a key that some samples lack raises DataError."""
    keys = [key for key in TOKEN_KEYS if any(key in s for s in samples)]
    for key in keys:
        if not all(key in s for s in samples):
            raise DataError(f'some samples of a micro-batch have "{key}" and some have not')
    return keys


def _lengths(sample: Sample) -> list[int]:
    """The lengths of the samples that a sample is made of: usually its own alone."""
    lengths: list[int] = sample.get("seq_lens", [len(sample["input_ids"])])
    return lengths


def _axes(samples: list[Sample]) -> int:
    """How many axes the positions that samples bring have; 0 if none does."""
    return max((s["position_ids"].numel() // len(s["input_ids"]) for s in samples if "position_ids" in s), default=0)


def _positions(sample: Sample, axes: int) -> Tensor:
    """[axes, T]: the positions that a sample brings; those that count its tokens, on every axis, if it brings none."""
    positions: Tensor = sample["position_ids"] if "position_ids" in sample else _restarting(_lengths(sample))
    return positions.expand(axes, -1)


def _restarting(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def _shift(labels: Tensor, lengths: list[int]) -> Tensor:
    """[T] -> [T]: the target of position t is label t + 1; the last position of each sample has none."""
    shifted = labels.roll(-1)
    shifted[torch.tensor(lengths).cumsum(0) - 1] = IGNORED_LABEL
    return shifted


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _media_keys(sample: Sample) -> list[str]:
    return [key for key in sample if key not in TOKEN_KEYS and key not in ("position_ids", "seq_lens")]


def _modalities(samples: list[Sample]) -> Batch:
    parts: dict[str, list[Tensor]] = {}
    for sample in samples:
        for key in _media_keys(sample):
            parts.setdefault(key, []).append(sample[key])
    _pad_frames(parts)
    batch: Batch = {}
    for key, tensors in parts.items():
        same_dtype = {t.dtype for t in tensors} <= _NUMBERS or len({t.dtype for t in tensors}) == 1
        if len({t.shape[1:] for t in tensors}) > 1 or not same_dtype:
            shapes = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors)
            raise DataError(f'"{key}" of the samples of a micro-batch cannot be concatenated along dim 0: {shapes}')
        batch[key] = torch.cat(tensors)
    return batch


def _pad_frames(parts: dict[str, list[Tensor]]) -> None:
    """Sound of different lengths, whose mask says which frames are sound, to the frames of the longest.

    `input_features` are [n, mel, frames] or [n, frames, mel], the mask [n, frames].
    """
    mask_key = next((key for key in _FRAME_MASKS if key in parts), None)
    features, masks = parts.get("input_features"), parts.get(mask_key or "")
    if features is None or masks is None or mask_key is None or len(features) != len(masks):
        return
    width = max(mask.shape[-1] for mask in masks)
    axes = {axis for axis in (1, 2) if len({f.shape[axis] for f in features if f.dim() == 3}) > 1}
    if len(axes) != 1 or any(f.dim() != 3 for f in features):
        return
    (axis,) = axes
    if any(f.shape[axis] != mask.shape[-1] for f, mask in zip(features, masks, strict=True)):
        return
    parts[mask_key] = [F.pad(mask, (0, width - mask.shape[-1])) for mask in masks]
    after = (0, 0) if axis == 1 else ()
    parts["input_features"] = [F.pad(f, (*after, 0, width - f.shape[axis])) for f in features]
