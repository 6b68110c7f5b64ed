"""Collectives that gradients flow through, each with its adjoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# torch 2.14 renamed it
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def sum_parts(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of what the ranks hold, on all of them; each keeps the gradient of the sum."""
    return _SumForward.apply(x, group)


def sum_gradients(x: torch.Tensor, group: Any) -> torch.Tensor:
    """`x`, equal on all ranks and used differently by each; its gradient is the sum of theirs."""
    return _SumBackward.apply(x, group)


def sum_gradients_once(x: torch.Tensor, group: Any) -> torch.Tensor:
    """`sum_gradients`, the same tensor for all that are handed `x`: q, k and v sum its gradient over ranks once."""
    if x.is_leaf or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return sum_gradients(x, group)
    if not hasattr(x, "_summed_gradients"):
        x._summed_gradients = _SumBackward.apply(x, group, True)
    return x._summed_gradients


def take_part(x: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    """This rank's chunk along `dim` of `x`, equal on all ranks; gradients of the chunks are joined.

    Chunks are of ceil(length / ranks), the last ones shorter or empty.
    """
    return _TakePart.apply(x, group, dim) if x.is_floating_point() else _own(x, group, dim)


def join_parts(x: torch.Tensor, group: Any, dim: int, length: int) -> torch.Tensor:
    """The whole along `dim`, `length` long, of what each rank holds a chunk of; undoes `take_part`."""
    return _JoinParts.apply(x, group, dim, length)


def exchange(x: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
    """Deal the rows of `x` out, the i-th block to rank i; gradients travel back.

    x: [sum(send), ...], blocks in the order of ranks -> [sum(receive), ...], likewise.
    """
    return _Exchange.apply(x, send, receive, group)


class _SumForward(torch.autograd.Function):
    """Sum over the ranks; the gradient of the sum, which is the same on all of them, is that of each part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _SumBackward(torch.autograd.Function):
    """x -> x, used differently by each rank, so that its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, remembered: bool = False) -> torch.Tensor:
        ctx.group = group
        if not remembered:
            return x.view_as(x)
        # no view: it would hold x, which holds it
        return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None, None


class _TakePart(torch.autograd.Function):
    """This rank's chunk along a dimension of what all ranks hold alike; gradients of the chunks are joined."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.length = group, dim, x.shape[dim]
        return _own(x, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _join(gradient, ctx.group, ctx.dim, ctx.length), None, None


class _JoinParts(torch.autograd.Function):
    """The whole of what each rank holds a chunk of; undoes `take_part`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, dim: int, length: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _join(x, group, dim, length)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _own(gradient, ctx.group, ctx.dim), None, None, None


class _Exchange(torch.autograd.Function):
    """x: [sum(send), ...], its rows dealt out in the order of ranks -> [sum(receive), ...] in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Exchange.apply(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def _own(x: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
    """This rank's chunk along `dim`: chunks of ceil(length / ranks), the last ones shorter or empty."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    size, length = -(-x.shape[dim] // ranks), x.shape[dim]
    start = min(rank * size, length)
    return x.narrow(dim, start, min(size, length - start)).clone(memory_format=torch.contiguous_format)


def _join(x: torch.Tensor, group: Any, dim: int, length: int) -> torch.Tensor:
    """All ranks' chunks, as `_own` cuts them, along `dim`, which is `length` long in all."""
    ranks = dist.get_world_size(group)
    size = -(-length // ranks)
    part = x.movedim(dim, 0)
    if part.shape[0] < size:
        part = torch.cat([part, part.new_zeros(size - part.shape[0], *part.shape[1:])])
    whole = part.new_empty(ranks * size, *part.shape[1:])
    _all_gather(whole, part.contiguous(), group=group)
    if dim == 0 and ranks * size == length:
        return whole
    # never a view: FSDP hangs the start of backward on what a module returns, and a change in place would drop it
    return whole[:length].movedim(0, dim).clone(memory_format=torch.contiguous_format)
