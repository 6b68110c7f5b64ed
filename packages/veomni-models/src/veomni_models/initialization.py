"""Random weights for a model that was built on the meta device, the same ones however it is sharded."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.parametrize import is_parametrized

from veomni_models.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def initialize_weights(model: PreTrainedModel, seed: int, device: torch.device | str | None = None) -> None:
    """Give a model the random weights that its own `_init_weights` functions draw after `torch.manual_seed(seed)`.

    Parameters may be sharded (FSDP2 and other DTensors): each is drawn whole, one block at a time, and every rank
    keeps its part, so that 1 and N ranks hold the same numbers. No rank holds more whole parameters beside its shards
    than those of one block and of what stands around the blocks, such as embeddings. Buffers that are not saved (rotary
    frequencies) are restored too. The global generators are left alone.

    Args:
        model: a transformers model, on the meta device or with storage.
        seed: of the random generators.
        device: where meta tensors get their storage; needed only if there are any.

    Raises:
        ValueError: the model is on the meta device and no device is given.
    """
    if any(p.is_meta for p in model.parameters()):
        if device is None:
            raise ValueError("the model is on the meta device: say on which device its weights are to be made")
        model.to_empty(device=device)
        model.tie_weights()
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dtype.is_floating_point:
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(math.nan)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _visit(model, model)
        _draw_forgotten(model, seed)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters and saved buffers of a whole model into one of the same names that may be sharded.

    Every rank has the whole `source`, and keeps its part; nothing is communicated.

    Raises:
        ModelError: a tensor of the target has no counterpart of its shape.
    """
    values, persistent = dict(source.named_parameters()) | dict(source.named_buffers()), source.state_dict()
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        if name not in persistent and name in values:
            continue
        if name not in values or values[name].shape != tensor.shape:
            raise ModelError(
                f"{type(source).__name__} has no {name} of shape {list(tensor.shape)}, which is to be filled"
            )
        keep_own_part(values[name].detach().to(tensor.device, tensor.dtype), tensor)


def keep_own_part(whole: torch.Tensor, target: torch.Tensor) -> None:
    """Copy this rank's part of a tensor that every rank has whole; nothing is communicated."""
    if isinstance(target, DTensor):
        # no source rank: every rank has the same whole tensor, so nothing is sent
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)


def _visit(module: nn.Module, owner: PreTrainedModel) -> None:
    """Children first, each by the nearest transformers model above it, in the order of transformers itself."""
    from transformers import PreTrainedModel

    with _whole_parameters(module):
        for child in module.children():
            _visit(child, child if isinstance(child, PreTrainedModel) else owner)
        _draw_parametrized(module)
        owner._init_weights(module)


def _draw_forgotten(model: PreTrainedModel, seed: int) -> None:
    """Tensors that no `_init_weights` wrote, because a class draws them when it is made: as a whole new model has them.

    Every rank makes the model once more on the CPU, which only classes that forget something need (GPT, Apertus).
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    forgotten = [name for name, tensor in tensors.items() if tensor.dtype.is_floating_point and _any_nan(tensor)]
    if not forgotten:
        return
    torch.manual_seed(seed)
    whole = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    values = dict(whole.named_parameters()) | dict(whole.named_buffers())
    for name in forgotten:
        keep_own_part(values[name].detach().to(tensors[name].device, tensors[name].dtype), tensors[name])


def _any_nan(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(local.isnan().any())


def _draw_parametrized(module: nn.Module) -> None:
    """Weights that are computed of others (weight norm), which `_init_weights` cannot write: as torch draws them."""
    if is_parametrized(module, "weight"):
        module.weight = nn.init.kaiming_uniform_(torch.empty_like(cast(torch.Tensor, module.weight)), a=math.sqrt(5))


def _holds_units(module: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in module.modules() if m is not module)


@contextmanager
def _whole_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, sharded parameters are whole tensors; on leaving, each rank's shard takes its part of them.

    Those of the whole module; if there are FSDP units in it, its own and those of its children that are and have none,
    since some models write to a child's (Whisper's positions).
    """
    inside = list(module.modules())
    if _holds_units(module):
        children = [child for child in module.children() if not isinstance(child, FSDPModule)]
        inside = [module, *(m for child in children if not _holds_units(child) for m in child.modules())]
    sharded = [(m, name, p) for m in inside for name, p in m.named_parameters(recurse=False) if isinstance(p, DTensor)]
    with whole_parameters(sharded):
        yield


Slot: TypeAlias = tuple[nn.Module, str, nn.Parameter]
"""A module, the name of a parameter of its own, and that parameter."""


@contextmanager
def whole_parameters(sharded: Sequence[Slot], gather: bool = False) -> Iterator[None]:
    """Inside, these sharded parameters are whole tensors; on leaving, each rank's shard takes its part of them.

    Their values are undefined inside, or with `gather`, for which all ranks come together, what they were.
    """
    wholes: dict[nn.Parameter, nn.Parameter] = {}
    for m, name, p in sharded:
        # a parameter that two modules share stays shared
        if p not in wholes:
            value = p.full_tensor() if gather else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            wholes[p] = nn.Parameter(value.detach(), p.requires_grad)
        setattr(m, name, wholes[p])
    try:
        yield
    finally:
        for m, name, p in sharded:
            setattr(m, name, p)
    for p, whole in wholes.items():
        keep_own_part(whole.data, p)
