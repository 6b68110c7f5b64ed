"""An exponential moving average of the weights, on whatever shards they lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from veomni_recipes.shards import local


@torch.no_grad()
def update_ema(optimizer: torch.optim.Optimizer, decay: float | None) -> None:
    """Take the weights of a step into their average: average <- decay * average + (1 - decay) * weights.

    Call it after `optimizer.step()`. The average is a state of the optimizer, `ema`, of the parameter's dtype and
    layout, so that it is saved and loaded with it. It begins with the weights after a parameter's first step.

    Args:
        optimizer: has stepped; each rank updates its own shards.
        decay: None drops the averages that a checkpoint may have brought.
    """
    averages, weights = [], []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            if decay is None:
                state.pop("ema", None)
            elif "ema" in state:
                averages.append(local(state["ema"]))
                weights.append(local(parameter))
            else:
                state["ema"] = parameter.detach().clone()
    if averages and decay is not None:
        torch._foreach_lerp_(averages, weights, 1 - decay)


@contextmanager
def ema_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it the model has the averaged weights, where there are any, and the averages are kept in their place."""
    _swap(optimizer)
    try:
        yield
    finally:
        _swap(optimizer)


@torch.no_grad()
def _swap(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        if "ema" in state:
            weight, average = local(parameter), local(state["ema"])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
