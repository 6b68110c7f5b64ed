"""Causal attention over a packed row without a mask of the whole row.

A row of T tokens that holds n samples needs n small triangles, not one T x T mask. Samples are cut into pieces (a
chunk, or some queries with the keys in their window), pieces of similar length are stacked into a batch, and any
attention kernel computes the stacks. Where samples begin and end comes from `cu_seq_lens`, so no sample sees another
one, whatever mask the model would have built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from veomni_parallel.errors import ParallelError

_STACKING = 1.25
"""A stack holds pieces whose lengths differ by at most this factor."""
_SHORTEST_BAND = 64
"""Queries of a window that are attended to together are at least this many, so that products are not tiny."""


@dataclass(frozen=True)
class MaskRule:
    """What a token of a sample sees of the tokens before it: all (and itself), or less."""

    window: int | None = None
    """Itself and this many minus one before it (sliding window)."""
    chunk: int | None = None
    """Those of its own chunk; a sample's chunks of this length begin at its first token."""


@dataclass(frozen=True)
class Stack:
    """`n` pieces of one shape that are attended to together; shorter ones are padded behind their end."""

    n: int
    queries: Tensor | slice
    """Positions in the row, [n * L]; a slice for a single piece."""
    keys: Tensor | slice
    """Positions in the row, [n * K]; a slice for a single piece."""
    mask: Tensor | None
    """bool [L, K], True where a query sees a key; None: each query sees the keys up to its own place (L = K)."""


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q [n, H, L, D], k [n, Hkv, K, D], v [n, Hkv, K, Dv], mask as in `Stack`) -> [n, L, H, Dv]."""


def sample_bounds(cu_seq_lens: Tensor) -> tuple[int, ...]:
    """(0, ..., T): where the samples of a row of T tokens begin and end; samples without a token are left out.

    Raises:
        ParallelError: `cu_seq_lens` does not grow from 0.
    """
    bounds = tuple(dict.fromkeys(cu_seq_lens.tolist()))
    if len(bounds) < 2 or bounds[0] != 0 or any(b < a for a, b in pairwise(bounds)):
        raise ParallelError(
            f"cu_seq_lens_q must grow from 0 to the number of tokens of the row, but it is {cu_seq_lens.tolist()}."
        )
    return bounds


def chunk_bounds(bounds: tuple[int, ...], chunk: int | None) -> tuple[int, ...]:
    """The bounds of all samples' chunks; `bounds` itself without a chunk length."""
    if chunk is None:
        return bounds
    return tuple(start for a, b in pairwise(bounds) for start in range(a, b, chunk)) + bounds[-1:]


@lru_cache(maxsize=32)  # the same in every layer of a step that has the same rule
def stack_pieces(bounds: tuple[int, ...], rule: MaskRule, device: torch.device) -> tuple[list[Stack], Tensor | None]:
    """Cut a row into stacks of pieces.

    Args:
        bounds: as of `sample_bounds`.
        rule: what tokens see.
        device: of the tensors returned.

    Returns:
        The stacks, and for each token of the row its place [T] among the queries of all stacks, one after the other;
        None if they are in the order of the row.
    """
    pieces: dict[int, list[tuple[int, int]]] = {}  # by the keys looked back at: (length, first query)
    window = rule.window
    for start, end in pairwise(chunk_bounds(bounds, rule.chunk)):
        band = max(window, _SHORTEST_BAND) if window is not None else end - start
        if window is None or end - start <= 2 * band:
            pieces.setdefault(0, []).append((end - start, start))
            continue
        for first in range(start, end, band):
            back = 0 if first == start else window - 1
            pieces.setdefault(back, []).append((min(band, end - first), first))

    stacks: list[Stack] = []
    places, base = torch.empty(bounds[-1], dtype=torch.long), 0
    for back, found in pieces.items():
        groups: list[list[tuple[int, int]]] = []
        for length, first in sorted(found, key=lambda piece: (-piece[0], piece[1])):
            if not groups or length * _STACKING < groups[-1][0][0]:
                groups.append([])
            groups[-1].append((length, first))
        for group in groups:
            longest = group[0][0]
            stacks.append(_stack(group, back, window, device))
            for length, first in group:
                places[first : first + length] = torch.arange(base, base + length)
                base += longest
    in_order = base == bounds[-1] and bool((places == torch.arange(base)).all())
    return stacks, None if in_order else places.to(device)


def _stack(group: list[tuple[int, int]], back: int, window: int | None, device: torch.device) -> Stack:
    longest = group[0][0]
    mask = None
    if window is not None and (back or longest > window):
        distance = torch.arange(longest)[:, None] + back - torch.arange(back + longest)
        mask = ((distance >= 0) & (distance < window)).to(device)
    if len(group) == 1:
        first = group[0][1]
        return Stack(1, slice(first, first + longest), slice(first - back, first + longest), mask)
    lengths, firsts = torch.tensor(group).T
    # behind its end a piece repeats its last position: later than every query that is kept, hence unseen
    queries = firsts[:, None] + torch.arange(longest).minimum(lengths[:, None] - 1)
    keys = firsts[:, None] + torch.arange(-back, longest).minimum(lengths[:, None] - 1)
    return Stack(len(group), queries.flatten().to(device), keys.flatten().to(device), mask)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], rule: MaskRule, kernel: Kernel | None = None
) -> Tensor:
    """Attention over a packed row in which no sample sees another one.

    Args:
        q: [1, H, T, D].
        k: [1, Hkv, T, D], where Hkv divides H.
        v: [1, Hkv, T, Dv].
        bounds: (0, ..., T) where samples begin and end, see `sample_bounds`.
        rule: what a token sees of its sample.
        kernel: computes a stack of pieces; None: torch's scaled dot-product attention with the scale 1/sqrt(D).

    Returns:
        [1, T, H, Dv].
    """
    kernel = kernel or softmax_kernel()
    stacks, places = stack_pieces(bounds, rule, q.device)
    attended = []
    for stack in stacks:
        # [1, H, T, D] -> [n, H, L, D]
        sq = q[0][:, stack.queries].unflatten(1, (stack.n, -1)).transpose(0, 1)
        sk, sv = (x[0][:, stack.keys].unflatten(1, (stack.n, -1)).transpose(0, 1) for x in (k, v))
        attended.append(kernel(sq, sk, sv, stack.mask).flatten(0, 1))  # [n * L, H, Dv]
    row = torch.cat(attended) if len(attended) > 1 else attended[0]
    return (row if places is None else row[places])[None]


def softmax_kernel(
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Kernel:
    """A kernel in plain torch, with what torch's own scaled dot-product attention lacks.

    Args:
        scaling: factor of the scores; None: 1/sqrt(D).
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2).
        sinks: [H] a score per head that takes part in the softmax and gives nothing (gpt-oss).
        dropout: probability with which a weight is dropped.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if softcap is None and sinks is None:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=groups > 1,
            )
            return out.transpose(1, 2)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q * (q.shape[-1] ** -0.5 if scaling is None else scaling)) @ k.transpose(-1, -2)  # [n, H, L, K]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is None:
            weights = scores.softmax(-1, dtype=torch.float32)
        else:
            column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, column], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
        return (F.dropout(weights.to(v.dtype), dropout) @ v).transpose(1, 2)

    return kernel
