"""What one rank of a sequence-parallel group keeps of a packed row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .collators import IGNORED_LABEL, Batch
from .errors import DataError

_TARGET_KEYS = ("labels", "shift_labels")
_SEGMENT_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_TEXT_KEYS = ("input_ids", "position_ids", "mm_token_type_ids", "token_type_ids", *_TARGET_KEYS)


def slice_for_sequence_parallel(batch: Batch, rank: int, size: int, *, pad_token_id: int = 0) -> Batch:
    """The part of a packed row that rank `rank` of `size` works on.

    T is padded to a multiple of `size`; the padding is a segment of its own at the end of `cu_seq_lens_q/k`, without
    a target. `cu_seq_lens_q/k` and `max_length_q/k` describe the whole row on every rank.

    With text alone, each [1, T] tensor (and M-RoPE `position_ids`, [4, 1, T] or [3, 1, T]) becomes its `rank`-th slice
    of T / size. With modality tensors (any other key, such as `pixel_values`) only `labels` and `shift_labels` are
    sliced: `input_ids` and `position_ids` stay whole, as features are merged into the whole row before it is sliced.

    Args:
        batch: what `PackingCollator` makes; it is not changed.
        rank, size: place in the sequence-parallel group; size 1 returns `batch` itself.
        pad_token_id: what `input_ids` is padded with.

    Raises:
        DataError: a padded batch [B, S], a row without `cu_seq_lens_q/k`, or a rank outside of the group.
    """
    if not 0 <= rank < size:
        raise DataError(f"rank={rank} is not one of the {size} ranks of a sequence-parallel group")
    if size == 1:
        return batch
    if "attention_mask" in batch or "cu_seq_lens_q" not in batch:
        kind = "padded batch" if "attention_mask" in batch else "batch without cu_seq_lens_q"
        raise DataError(
            f"a {kind} of shape {list(batch['input_ids'].shape)} cannot be sliced over {size} sequence-parallel ranks: "
            f"pack the samples into one row (PackingCollator)"
        )
    tokens = batch["input_ids"].shape[-1]
    padding = -tokens % size
    padded = _pad_row(batch, padding, pad_token_id) if padding else dict(batch)
    has_modalities = any(key not in _TEXT_KEYS and key not in _SEGMENT_KEYS for key in batch)
    width = (tokens + padding) // size
    for key in _TARGET_KEYS if has_modalities else _TEXT_KEYS:
        if key in padded:
            padded[key] = padded[key].narrow(-1, rank * width, width)
    return padded


def _pad_row(batch: Batch, padding: int, pad_token_id: int) -> Batch:
    padded = dict(batch)
    fill = {"input_ids": pad_token_id, "labels": IGNORED_LABEL, "shift_labels": IGNORED_LABEL}
    for key in _TEXT_KEYS:
        if key in batch and key != "position_ids":
            padded[key] = F.pad(batch[key], (0, padding), value=fill.get(key, 0))
    positions: Tensor = batch["position_ids"]
    restart = torch.arange(padding, device=positions.device, dtype=positions.dtype)
    padded["position_ids"] = torch.cat([positions, restart.expand(*positions.shape[:-1], padding)], dim=-1)
    for side in "qk":
        ends: Tensor = batch[f"cu_seq_lens_{side}"]
        padded[f"cu_seq_lens_{side}"] = torch.cat([ends, ends[-1:] + padding])
        padded[f"max_length_{side}"] = max(batch[f"max_length_{side}"], padding)
    return padded
