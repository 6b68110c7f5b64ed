"""The differentiable all-to-all behind Ulysses: at once, or begun now and awaited later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from veomni_parallel.collectives import exchange


def all_to_all(x: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> torch.Tensor:
    """Send the i-th block of `x` to rank i of the group; the backward pass sends the gradients back.

    Args:
        x: [sum(send), ...], the blocks one after the other.
        send: entries for each rank.
        receive: entries from each rank, what that rank has as `send` for this one.
        group: the ranks.

    Returns:
        [sum(receive), ...], the blocks that came, in the order of ranks.
    """
    return exchange(x, list(send), list(receive), group)


class PendingAllToAll:
    """An all-to-all that is under way while other work is done; `wait` gives its result, once.

    Backward mirrors it: the exchange begins where the result was awaited, and is awaited where it began. Autograd runs
    later operations first, so what was computed in between is also between the two in backward.
    """

    def __init__(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: Any) -> None:
        self.send, self.receive, self.group = list(send), list(receive), group
        self.work: Any = None
        self.kept: torch.Tensor | None = None  # a buffer must outlive the exchange that reads it
        self.arriving: torch.Tensor | None = None
        self._result: torch.Tensor = _Begin.apply(x, self)

    def start(self, x: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Begin an exchange into a new buffer, which is not yet to be read."""
        self.kept = x.contiguous()
        out = x.new_empty(sum(receive))
        self.work = dist.all_to_all_single(out, self.kept, receive, send, group=self.group, async_op=True)
        return out

    def finish(self) -> None:
        """Wait for the exchange that is under way."""
        self.work.wait()
        self.work = self.kept = None

    def wait(self) -> torch.Tensor:
        """[sum(receive)], the blocks that came, in the order of ranks."""
        return _Await.apply(self._result, self)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pending: PendingAllToAll) -> torch.Tensor:
        ctx.pending = pending
        return pending.start(x, pending.send, pending.receive)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.pending.finish()
        arrived, ctx.pending.arriving = ctx.pending.arriving, None
        return arrived, None


class _Await(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pending: PendingAllToAll) -> torch.Tensor:
        ctx.pending = pending
        pending.finish()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # the gradients that arrive are for `_Begin`, and may be more or fewer than those sent, which autograd hands it
        ctx.pending.arriving = ctx.pending.start(gradient, ctx.pending.receive, ctx.pending.send)
        return gradient, None
