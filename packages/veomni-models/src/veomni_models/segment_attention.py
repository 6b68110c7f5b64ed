"""Causal attention over packed rows as a loop over samples of similar length, with no mask of the whole row.

A row of T tokens that holds n samples needs n small triangles, not one T x T mask. Samples of similar length are
stacked and attended to together; padding behind a sample's end is never seen by its own tokens, since attention is
causal. The segments come from `cu_seq_lens_q`, so samples stay apart even in models that build leaking masks.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "segments"
_LONGEST_EXPLICIT = 512  # above this, the scores of a segment no longer fit the cache and the fused kernel is faster
_STACKING = 1.25  # a stack holds segments whose lengths differ by at most this factor


def register_segment_attention() -> str:
    """Make the kernel known to transformers under the name `segments`; returns the name. Repeating it is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def _mask(
    *args: Any, attention_mask: Tensor | None = None, q_length: int = 0, kv_length: int = 0, **kwargs: Any
) -> Tensor | None:
    """No mask for whole rows (segments say what is seen), transformers' own for padded rows and for decoding."""
    if attention_mask is None and q_length == kv_length:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, q_length=q_length, kv_length=kv_length, **kwargs)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' interface.

    Args:
        module: the attention layer (only handed on to transformers' kernel when a mask is given).
        query: [B, H, T, D]. B is 1 for a packed row.
        key, value: [B, H_kv, T, D] and [B, H_kv, T, D_v]; H_kv divides H.
        attention_mask: as made by the mask function of the same name; with one, transformers' sdpa does the work.
        scaling: factor of the scores, 1/sqrt(D) if None.
        sliding_window: a token sees itself and this many minus one before it.
        cu_seq_lens_q: int32 [n + 1], where the row's samples begin and end. Without it they are read off
            `position_ids` [1, T], which restart at 0 with every sample.

    Returns:
        [B, T, H, D_v] and None for the weights.
    """
    bidirectional = kwargs.get("is_causal", getattr(module, "is_causal", True)) is False
    if attention_mask is not None or query.shape[2] != key.shape[2] or bidirectional:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if bidirectional and attention_mask is None and len(_bounds(query, cu_seq_lens_q, position_ids)) > 2:
            raise ValueError(
                f"{type(module).__name__} is not causal, so samples of its packed rows need a mask: use sdpa"
            )

        if attention_mask is None or (kwargs.get("softcap") is None and kwargs.get("s_aux") is None):
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    softcap, sinks, dropout = kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("dropout", 0.0)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:  # with sinks or a cap, which sdpa does not know
        return _masked(query, key, value, attention_mask, scaling, softcap, sinks, dropout).transpose(
            1, 2
        ).contiguous(), None
    rest = (scaling, sliding_window, softcap, sinks, dropout)
    bounds = _bounds(query, cu_seq_lens_q, position_ids)
    if len(bounds) == 2:
        return _causal(query, key, value, *rest).transpose(1, 2).contiguous(), None
    stacks, places = _stacks(bounds, query.device)
    attended = []
    for positions, n in stacks:
        # [1, H, T, D] -> [n, H, L, D]
        q, k, v = (x[0][:, positions].unflatten(1, (n, -1)).transpose(0, 1) for x in (query, key, value))
        attended.append(_causal(q, k, v, *rest).transpose(1, 2).flatten(0, 1))  # [n * L, H, D_v]
    return torch.cat(attended)[places][None], None


def _bounds(query: Tensor, cu_seq_lens: Tensor | None, position_ids: Tensor | None) -> tuple[int, ...]:
    """Where segments begin, and the row's end: (0, ..., T)."""
    length = query.shape[2]
    if query.shape[0] > 1:
        return (0, length)
    if cu_seq_lens is not None:
        bounds = tuple(dict.fromkeys(cu_seq_lens.tolist()))
    elif position_ids is not None and position_ids.ndim == 2 and position_ids.shape[-1] == length:
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        bounds = tuple(dict.fromkeys((0, *starts, length)))
    else:
        bounds = (0, length)
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(
            f"cu_seq_lens_q must run from 0 to the row's {length} tokens, but runs from {bounds[0]} to {bounds[-1]}"
        )
    return bounds


@lru_cache(maxsize=16)  # the same in every layer of a step
def _stacks(bounds: tuple[int, ...], device: torch.device) -> tuple[list[tuple[Tensor, int]], Tensor]:
    """Stacks of segments of similar length, and the way back.

    Returns:
        For each stack the row positions [n * L] of its n segments (shorter ones repeat their last position up to the
        longest, L) with n; and for every token of the row its place [T] among the stacked positions.
    """
    segments = sorted(((b - a, a) for a, b in pairwise(bounds)), reverse=True)
    groups: list[list[tuple[int, int]]] = []
    for length, start in segments:
        if not groups or length * _STACKING < groups[-1][0][0]:
            groups.append([])
        groups[-1].append((length, start))
    places, stacks, base = torch.empty(bounds[-1], dtype=torch.long), [], 0
    for group in groups:
        longest = group[0][0]
        lengths, starts = torch.tensor(group).T
        offsets = torch.arange(longest).minimum(lengths[:, None] - 1)  # [n, L]
        stacks.append(((starts[:, None] + offsets).flatten().to(device), len(group)))
        for length, start in group:
            places[start : start + length] = torch.arange(base, base + length)
            base += longest
    return stacks, places.to(device)


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Causal attention of q [n, H, L, D] to k, v [n, H_kv, L, D]: -> [n, H, L, D_v]."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    plain = softcap is None and sinks is None and (window is None or window >= length)
    if plain and (length > _LONGEST_EXPLICIT or q.is_cuda):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=groups > 1
        )
    position = torch.arange(length, device=q.device)
    distance = position[:, None] - position[None, :]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return _masked(q, k, v, seen, scaling, softcap, sinks, dropout)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention where `mask`, which broadcasts to [n, H, L, K], is true or is added: -> [n, H, L, D_v]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    scores = (q * scaling) @ k.transpose(-1, -2)  # [n, H, L, K]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        weights = scores.softmax(-1, dtype=torch.float32)
    else:  # a sink takes part in the softmax and gives nothing: its column is dropped
        column = sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, column.to(scores.dtype)], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    return F.dropout(weights.to(v.dtype), dropout) @ v
