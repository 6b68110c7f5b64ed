"""AdamW whose states are bfloat16: half the memory of the usual ones, and weights in bfloat16 that lose no update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from veomni_recipes.shards import local


class AnyPrecisionAdamW(torch.optim.Optimizer):
    """AdamW, computed in float32, with `exp_avg` and `exp_avg_sq` in bfloat16; on shards each rank its own.

    The second moment changes by a thousandth a step, less than bfloat16 resolves: rounded to the nearest it would only
    ever grow, so it is rounded at random, up or down in proportion. The same step always rounds the same way.

    Weights in bfloat16 keep beside them what rounding took from them (`compensation`, bfloat16), as Kahan summation
    does: the two together are the weight that is updated.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Args are those of `torch.optim.AdamW`."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, on the gradients that there are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._update(parameter, group, index)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            names = ["exp_avg", "exp_avg_sq", *(["compensation"] if parameter.dtype == torch.bfloat16 else [])]
            for name in names:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"].item()), group["betas"]
        weight, gradient = local(parameter).float(), local(parameter.grad).float()
        first, second = local(state["exp_avg"]), local(state["exp_avg_sq"])

        mean = first.float().lerp_(gradient, 1 - beta1)
        square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first.copy_(mean)
        second.copy_(_rounded_at_random(square, step * 1_000_003 + index))

        if "compensation" in state:
            weight += local(state["compensation"])
        elif weight.data_ptr() == local(parameter).data_ptr():
            weight = weight.clone()
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        root = square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        weight.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
        local(parameter).copy_(weight)
        if "compensation" in state:
            local(state["compensation"]).copy_(weight - local(parameter).float())


def _rounded_at_random(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Float32 -> bfloat16, up or down so that the mean is x."""
    generator = torch.Generator(x.device).manual_seed(seed)
    # a bfloat16 is the upper half of a float32's bits
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()
