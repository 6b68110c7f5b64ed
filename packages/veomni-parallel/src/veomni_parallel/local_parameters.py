"""Let the forward of any module run on this rank's part of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def local_parts(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own distributed parameters as plain local tensors, connected to them for autograd."""
    own = module._parameters.items()
    return {name: parameter.to_local() for name, parameter in own if isinstance(parameter, DTensor)}


@contextmanager
def parameters_replaced(module: nn.Module, tensors: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the module's own parameters of these names are the given tensors (or None).

    The dictionary is changed because an attribute of a module that is a parameter takes nothing but parameters. What
    lies there at the time is put back: FSDP has sharded and whole parameters take turns in it.
    """
    before = {name: module._parameters[name] for name in tensors}
    module._parameters.update(tensors)
    try:
        yield
    finally:
        module._parameters.update(before)


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)


class _ScaleGradient(torch.autograd.Function):
    """x -> x, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None
