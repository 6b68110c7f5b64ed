"""Ulysses: ranks that share a row of tokens swap the sequence for heads around attention.

Each rank holds a slice of a row. Before attention an all-to-all gives it the whole row of 1/P of the heads, after
attention another gives it back its tokens with all heads. Everything else of a transformer works on tokens one by one.
(Jacobs et al., DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from veomni_parallel.all_to_all import PendingAllToAll, all_to_all
from veomni_parallel.errors import ParallelError

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# counts calls of `ulysses_attention` inside one watched forward; unset otherwise
_calls: ContextVar[list[int] | None] = ContextVar("ulysses_calls", default=None)


def row_slices(length: int, ranks: int) -> list[int]:
    """Tokens of each rank of a row, as `torch.tensor_split` cuts it: the first `length % ranks` have one more."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


def sequence_to_heads(x: torch.Tensor, group: Any, lengths: Sequence[int] | None = None) -> torch.Tensor:
    """[B, H, S_own, D], all heads of a slice of the row -> [B, H/P, S, D], some heads of the whole row.

    `lengths`: tokens of each rank, S in all; None: as many as this one has.
    """
    blocks, sizes = _blocks_of_heads(x, group, lengths)
    return _join_tokens(all_to_all(blocks, [len(blocks) // len(sizes)] * len(sizes), sizes, group), x, sizes)


def begin_sequence_to_heads(
    x: torch.Tensor, group: Any, lengths: Sequence[int] | None = None
) -> Callable[[], torch.Tensor]:
    """`sequence_to_heads`, begun: what is returned waits for its result."""
    blocks, sizes = _blocks_of_heads(x, group, lengths)
    pending = PendingAllToAll(blocks, [len(blocks) // len(sizes)] * len(sizes), sizes, group)
    return lambda: _join_tokens(pending.wait(), x, sizes)


def heads_to_sequence(x: torch.Tensor, group: Any, lengths: Sequence[int] | None = None) -> torch.Tensor:
    """[B, H/P, S, D] -> [B, H, S_own, D]; undoes `sequence_to_heads`."""
    blocks, sizes, own = _blocks_of_tokens(x, group, lengths)
    return _join_heads(all_to_all(blocks, sizes, own, group), x, len(sizes))


def begin_heads_to_sequence(
    x: torch.Tensor, group: Any, lengths: Sequence[int] | None = None
) -> Callable[[], torch.Tensor]:
    """`heads_to_sequence`, begun: what is returned waits for its result."""
    blocks, sizes, own = _blocks_of_tokens(x, group, lengths)
    pending = PendingAllToAll(blocks, sizes, own, group)
    return lambda: _join_heads(pending.wait(), x, len(sizes))


def _blocks_of_heads(x: torch.Tensor, group: Any, lengths: Sequence[int] | None) -> tuple[torch.Tensor, list[int]]:
    """[B, H, S_own, D] -> P blocks [B, H/P, S_own, D] one after the other, and what comes from each rank."""
    ranks = dist.get_world_size(group)
    b, h, s, d = x.shape
    blocks = x.view(b, ranks, h // ranks, s, d).movedim(1, 0).reshape(-1)
    return blocks, [b * h // ranks * length * d for length in lengths or [s] * ranks]


def _join_tokens(blocks: torch.Tensor, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """P blocks [B, H/P, S_rank, D] -> [B, H/P, S, D]; `x` [B, H, S_own, D] is what was sent."""
    b, h, _, d = x.shape
    return torch.cat([block.view(b, h // len(sizes), -1, d) for block in blocks.split(sizes)], dim=2)


def _blocks_of_tokens(
    x: torch.Tensor, group: Any, lengths: Sequence[int] | None
) -> tuple[torch.Tensor, list[int], list[int]]:
    """[B, H/P, S, D] -> P blocks [B, H/P, S_rank, D], the elements for each rank and those from each rank."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    b, h, s, d = x.shape
    lengths = lengths or [s // ranks] * ranks
    blocks = torch.cat([part.reshape(-1) for part in x.split(list(lengths), dim=2)])
    return blocks, [b * h * length * d for length in lengths], [b * h * lengths[rank] * d] * ranks


def _join_heads(blocks: torch.Tensor, x: torch.Tensor, ranks: int) -> torch.Tensor:
    """P blocks [B, H/P, S_own, D] -> [B, H, S_own, D]; `x` [B, H/P, S, D] is what was sent."""
    b, h, _, d = x.shape
    return blocks.view(ranks, b, h, -1, d).movedim(0, 1).reshape(b, ranks * h, -1, d)


def key_head_repeats(kv_heads: int, ranks: int) -> int:
    """How often key and value heads are repeated so that `ranks` divide them: to the smallest common multiple."""
    return ranks // math.gcd(kv_heads, ranks)


def count_ulysses_call() -> None:
    """Tell a forward that is watched by `require_ulysses` that attention took part in sequence parallelism."""
    if (calls := _calls.get()) is not None:
        calls.append(1)


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: Any,
    attn: Attention,
    *,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attention over a row whose tokens are spread over the P ranks of `group`; differentiable.

    For attention that does not come from transformers; `apply_ulysses` calls it for the one that does. The number of
    query heads must be divisible by P; key and value heads are repeated as often as needed to be divided over the
    ranks. The size of a head may differ between q/k and v.

    Args:
        q: [B, H, S_own, D] this rank's tokens, position embedding already applied.
        k: [B, Hkv, S_own, D], where Hkv divides H.
        v: [B, Hkv, S_own, Dv].
        group: the ranks that share the row, in the order of its slices; None or a group of one: `attn(q, k, v)`.
        attn: (q [B, H/P, S, D], k [B, H'/P, S, D], v [B, H'/P, S, Dv]) -> [B, H/P, S, Dv] over the whole row, where H'
            is Hkv or, repeated, the smallest multiple of it that P divides; masks are its own affair.
        lengths: tokens of each rank, S in all, where ranks do not all hold S/P (see `torch.tensor_split`).

    Returns:
        [B, H, S_own, Dv], this rank's tokens.

    Raises:
        ParallelError: P does not divide H, or `lengths` does not fit this rank's tokens.
    """
    count_ulysses_call()
    ranks = dist.get_world_size(group) if group is not None else 1
    if ranks == 1:
        return attn(q, k, v)
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % ranks:
        raise ParallelError(f"{heads} attention heads cannot be divided over {ranks} Ulysses ranks.")
    if lengths is not None and (len(lengths) != ranks or lengths[dist.get_rank(group)] != q.shape[2]):
        raise ParallelError(
            f"lengths={list(lengths)} are not the tokens of {ranks} Ulysses ranks, of which rank"
            f" {dist.get_rank(group)} holds {q.shape[2]}."
        )
    if (repeats := key_head_repeats(kv_heads, ranks)) > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    q, k, v = (sequence_to_heads(x, group, lengths) for x in (q, k, v))
    return heads_to_sequence(attn(q, k, v), group, lengths)


def require_ulysses(model: nn.Module) -> None:
    """Refuse the first training step of `model` if nothing in it calls `ulysses_attention`.

    Raises:
        RuntimeError: then, at the end of that forward: each rank would attend to its own slice only.
    """

    title = type(model).__name__  # FSDP renames the class

    def watch(module: nn.Module, args: Any) -> None:
        if module.training:
            _calls.set([])

    def check(module: nn.Module, args: Any, output: Any) -> None:
        if (calls := _calls.get()) is None:
            return
        _calls.set(None)
        if not calls:
            raise RuntimeError(
                f"Rows are sliced over Ulysses ranks, but {title} did not call ulysses_attention in its"
                " first step: every rank would attend to its own slice only. Call it in the model's attention, or use"
                " ulysses=1."
            )
        before.remove()
        after.remove()

    before, after = model.register_forward_pre_hook(watch), model.register_forward_hook(check)
