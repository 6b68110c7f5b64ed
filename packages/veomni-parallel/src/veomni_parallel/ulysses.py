"""Ulysses: ranks that share a row of tokens swap the sequence for heads around attention.

Each rank holds 1/P of a row. Before attention an all-to-all gives it the whole row of 1/P of the heads, after attention
another gives it back its tokens with all heads. Everything else of a transformer works on tokens one by one.
(Jacobs et al., DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from veomni_parallel.errors import ParallelError

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# counts calls of `ulysses_attention` inside one watched forward; unset otherwise
_calls: ContextVar[list[int] | None] = ContextVar("ulysses_calls", default=None)


class _AllToAll(torch.autograd.Function):
    """x: [P, ...], block i goes to rank i; result: [P, ...], block i came from rank i. Its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None


def sequence_to_heads(x: torch.Tensor, group: Any) -> torch.Tensor:
    """[B, H, S/P, D], all heads of a slice of the row -> [B, H/P, S, D], some heads of the whole row."""
    ranks = dist.get_world_size(group)
    b, h, s, d = x.shape
    blocks = x.view(b, ranks, h // ranks, s, d).movedim(1, 0)  # [P, B, H/P, S/P, D]
    blocks = _AllToAll.apply(blocks, group)
    return blocks.movedim(0, 2).reshape(b, h // ranks, ranks * s, d)


def heads_to_sequence(x: torch.Tensor, group: Any) -> torch.Tensor:
    """[B, H/P, S, D] -> [B, H, S/P, D]; undoes `sequence_to_heads`."""
    ranks = dist.get_world_size(group)
    b, h, s, d = x.shape
    blocks = x.reshape(b, h, ranks, s // ranks, d).movedim(2, 0)  # [P, B, H/P, S/P, D]
    blocks = _AllToAll.apply(blocks, group)
    return blocks.movedim(0, 1).reshape(b, ranks * h, s // ranks, d)


def ulysses_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup | None, attn: Attention
) -> torch.Tensor:
    """Run any attention over rows that are sliced evenly over the ranks of `group`.

    Key and value heads are repeated as often as needed to be divided over the ranks. The size of a head may differ
    between q/k and v.

    Args:
        q: [B, H, S/P, D] this rank's tokens, position embedding already applied.
        k: [B, Hkv, S/P, D], where Hkv divides H.
        v: [B, Hkv, S/P, Dv].
        group: the ranks that share the row, in the order of its slices; None or a group of one: `attn(q, k, v)`.
        attn: (q [B, H/P, S, D], k [B, H'/P, S, D], v [B, H'/P, S, Dv]) -> [B, H/P, S, Dv] over the whole row, where H'
            is Hkv or, repeated, the smallest multiple of it that P divides; masks are its own affair.

    Returns:
        [B, H, S/P, Dv], this rank's tokens.

    Raises:
        ParallelError: P does not divide H.
    """
    if (calls := _calls.get()) is not None:
        calls.append(1)
    ranks = dist.get_world_size(group) if group is not None else 1
    if ranks == 1:
        return attn(q, k, v)
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % ranks:
        raise ParallelError(f"{heads} attention heads cannot be divided over {ranks} Ulysses ranks.")
    repeats = ranks // math.gcd(kv_heads, ranks)
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    q, k, v = (sequence_to_heads(x, group) for x in (q, k, v))
    return heads_to_sequence(attn(q, k, v), group)


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
