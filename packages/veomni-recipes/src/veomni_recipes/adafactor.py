"""Adafactor on whole tensors and on shards alike: a row and a column of second moments instead of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from veomni_recipes.shards import local, sum_over


class Adafactor(torch.optim.Optimizer):
    """Adafactor (https://arxiv.org/abs/1804.04235) with the numbers of `torch.optim.Adafactor`, which takes no shards.

    State: `row_var` [..., m, 1] and `col_var` [..., 1, n] of a parameter [..., m, n], laid out as it is; `variance` of
    one with a single dimension. Updates are scaled by the parameter's own size, so that `lr` is a relative step: 1e-2
    is a usual one. All ranks must step together.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        lr: float,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        """Args are those of `torch.optim.Adafactor`."""
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        # from the start, so that a checkpoint finds how they are laid out
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _first_state(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, on the gradients that there are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, ndim, every = self.state[parameter], parameter.ndim, range(parameter.ndim)
        row, column = ndim - 2, ndim - 1
        state["step"] += 1
        step, eps = state["step"].item(), group["eps"][0]
        if eps is None:
            eps = torch.finfo(parameter.dtype).eps
        weight, gradient = local(parameter), local(parameter.grad)
        share, size = step ** group["beta2_decay"], parameter.numel()

        rms = (sum_over(weight.float().square(), parameter, every) / size).sqrt_()
        alpha = rms.clamp_(min=group["eps"][1]).mul_(min(group["lr"], step**-0.5))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        square = gradient.square()
        if ndim > 1:
            rows, columns = local(state["row_var"]), local(state["col_var"])
            rows.lerp_(sum_over(square, parameter, {column}) / parameter.size(column), share)
            columns.lerp_(sum_over(square, parameter, {row}) / parameter.size(row), share)
            mean = sum_over(rows, parameter, {row}) / parameter.size(row)
            variance = (rows * columns).div_(mean.clamp_(min=eps))
        else:
            variance = local(state["variance"]).lerp_(square, share).clone()
        update = variance.clamp_(min=eps * eps).rsqrt_().mul_(gradient)
        rms = (sum_over(update.float().square(), parameter, every) / size).sqrt_()
        weight.sub_(update.mul_(alpha / rms.div_(group["d"]).clamp_(min=1.0)))


def _first_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    step, ndim = torch.tensor(0.0), parameter.ndim
    if ndim < 2:
        return {"step": step, "variance": torch.zeros_like(parameter, requires_grad=False)}
    return {"step": step, "row_var": _zeros(parameter, ndim - 1), "col_var": _zeros(parameter, ndim - 2)}


def _zeros(parameter: torch.Tensor, dim: int) -> torch.Tensor:
    """Zeros of the parameter's shape and layout, with 1 in the place of a dimension."""
    shape = list(local(parameter).shape)
    shape[dim] = 1
    zeros = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    if not isinstance(parameter, DTensor):
        return zeros
    placements = [Replicate() if getattr(p, "dim", None) == dim else p for p in parameter.placements]
    whole = torch.empty([1 if i == dim else n for i, n in enumerate(parameter.shape)], device="meta")
    return DTensor.from_local(
        zeros, parameter.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
