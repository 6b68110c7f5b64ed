"""Types of numbers: what parameters are computed in and what gradients are reduced in."""

from __future__ import annotations

from dataclasses import dataclass

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
