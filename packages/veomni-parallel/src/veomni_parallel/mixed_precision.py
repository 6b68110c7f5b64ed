"""Types of numbers: what parameters are computed in, what gradients are reduced in, what stays in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veomni_parallel.errors import ParallelError


@dataclass(frozen=True)
class MixedPrecision:
    """Compute in `param_dtype`, reduce gradients in `reduce_dtype`; parameters and optimizer keep their own type.

    FSDP computes with parameters cast to `param_dtype`. DDP and a single process use autocast of that type, which keeps
    sensitive operations in float32 and reduces gradients in the parameters' own type.
    """

    param_dtype: torch.dtype = torch.bfloat16
    reduce_dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype | None = None
    """Type of the floating tensors that the model returns; None: as they come."""
    float32: Sequence[str] = ()
    """Globs of module names ("*.router", "model.norm") that keep float32 parameters and compute in float32."""


def resolve_mixed_precision(given: str | MixedPrecision | None) -> MixedPrecision | None:
    """None, "bf16" or a `MixedPrecision`, as a `MixedPrecision` or None.

    Raises:
        ParallelError: any other string.
    """
    if given == "bf16":
        return MixedPrecision()
    if given is None or isinstance(given, MixedPrecision):
        return given
    raise ParallelError(f'mixed_precision={given!r} is none of None, "bf16" or a MixedPrecision.')


def autocast_forward(model: nn.Module, dtype: torch.dtype, device_type: str) -> None:
    """Run the forward pass of `model` under autocast."""
    model.forward = torch.autocast(device_type, dtype)(model.forward)


def compute_in_float32(module: nn.Module, precision: MixedPrecision, device_type: str) -> None:
    """Make a module an island: its parameters become float32, so do its inputs; its output is cast back."""
    module.float()
    cast_in = functools.partial(cast_floating, dtype=torch.float32)
    cast_out = functools.partial(cast_floating, dtype=precision.param_dtype)
    plain = torch.autocast(device_type, enabled=False)(module.forward)

    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return cast_out(plain(*cast_in(args), **cast_in(kwargs)))

    module.forward = forward


def cast_output(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating tensors in what the forward of `model` returns."""
    forward: Callable[..., Any] = model.forward
    model.forward = functools.wraps(forward)(lambda *args, **kwargs: cast_floating(forward(*args, **kwargs), dtype))


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """A tensor in `dtype` if it is of floating numbers; tuples, lists, mappings and named outputs item by item."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return type(value)(**{key: cast_floating(item, dtype) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast_floating(item, dtype) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(cast_floating(item, dtype) for item in value)
    return value
