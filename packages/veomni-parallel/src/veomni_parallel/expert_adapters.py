"""Adapters of peft on the 3-D weights of experts that are dealt over ranks.

peft adds the change of all experts to the weight before the experts run, which a rank that holds some of them cannot
do. Here the experts add the change of their own, from the slices of the two factors that are theirs. The factors stay
whole parameters like any other: each rank's gradient is zero outside of its slices, and the sum over ranks, which all
parameters get, is the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from veomni_parallel.errors import ParallelError


def adapters_around(model: nn.Module, experts: nn.Module) -> list[Any]:
    """peft's modules that adapt the experts' own parameters, the outermost first."""
    return [m for m in model.modules() if is_adapter(m) and any(inner is experts for inner in m.modules())]


def is_adapter(module: nn.Module) -> bool:
    """Whether the module is peft's wrapper of one parameter."""
    return type(module).__name__ == "ParamWrapper" and hasattr(module, "get_base_layer")


def check_adapters(name: str, adapters: Iterable[Any], ep: int, tp: int) -> None:
    """Raise ParallelError for adapters of the experts `name` that cannot be dealt over ranks."""
    for adapter in adapters:
        if tp > 1:
            raise ParallelError(
                f"The adapters of {name} cannot be dealt over ep={ep} ranks together with tp={tp}: use tp=1, or adapt"
                " other layers only."
            )
        if adapter.get_param().ndim != 3:
            raise ParallelError(
                f"The adapter of {adapter.parameter_name} of {name} cannot be dealt over ep={ep} ranks, since that has"
                f" {adapter.get_param().ndim} dimensions: adapt weights of 3 dimensions, or use ep=1."
            )


def hand_adapters_to_experts(adapters: Iterable[Any], active: list[Any]) -> None:
    """Let peft's modules change no weight, but be in the list `active` while the experts inside them run."""
    for adapter in adapters:
        adapter.forward = partial(_announced, adapter, active)


def adapted(part: torch.Tensor, name: str, adapters: Iterable[Any], first: int) -> torch.Tensor:
    """The weights of some experts with the change that adapters make to them.

    Args:
        part: parameter `name` of the experts `first`, `first` + 1, ...: [E/P, ., .].
        name: of the parameter, such as "gate_up_proj".
        adapters: those that are at work, for whatever parameters.
        first: index of the first expert among all.
    """
    for adapter in adapters:
        if adapter.parameter_name != name or adapter.disable_adapters or adapter.merged:
            continue
        for key in adapter.active_adapters:
            if key in adapter.lora_A:
                left, right = _factors(adapter, key, slice(first, first + part.shape[0]))
                # as peft does: in the type of the weight, whatever autocast would make of a matrix product
                with torch.autocast(part.device.type, enabled=False):
                    left, right = left.to(part.dtype), right.to(part.dtype)
                    part = torch.baddbmm(part, left, right, alpha=adapter.scaling[key])
    return part


def _announced(adapter: Any, active: list[Any], *args: Any, **kwargs: Any) -> Any:
    active.append(adapter)
    try:
        return adapter.base_layer(*args, **kwargs)
    finally:
        active.pop()


def _factors(adapter: Any, key: str, own: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of the change of some experts, whose product has the layout of the weight."""
    a, b = adapter.lora_A[key].weight, adapter.lora_B[key].weight  # [E * r, in], [out, r * E]
    a = a.reshape(adapter.num_experts, -1, a.shape[1])[own]  # [E/P, r, in]
    b = b.reshape(b.shape[0], -1, adapter.num_experts)[..., own].permute(2, 0, 1)  # [E/P, out, r]
    # peft takes weights for [E, in, out], and those that are not (most of transformers') for swapped
    return (b, a) if getattr(adapter, "_did_swap_in_out_features", False) else (a.mT, b.mT)
