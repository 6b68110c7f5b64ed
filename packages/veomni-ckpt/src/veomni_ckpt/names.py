"""The names that tensors have in the model as its author wrote it, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP1, `torch.compile` and activation checkpoint wrappers (FSDP2 wraps nothing)."""
    while True:
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module.get_submodule("_orig_mod")
        elif "_checkpoint_wrapped_module" in module._modules:
            module = module.get_submodule("_checkpoint_wrapped_module")
        else:
            return module


def named_tensors(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers under their original names; a tied tensor comes once for each of its names."""
    module = unwrap(model)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield prefix + name, parameter
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from named_tensors(child, f"{prefix}{name}.")


def frozen_names(model: nn.Module) -> set[str]:
    """The parameters that do not learn; one that is tied counts under each of its names."""
    tensors = named_tensors(model)
    return {name for name, tensor in tensors if isinstance(tensor, nn.Parameter) and not tensor.requires_grad}


def reshard(model: nn.Module) -> None:
    """Put FSDP2 parameters back in their sharded form: a forward pass without backward leaves the root gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_fsdp1(model: nn.Module) -> bool:
    """Whether any part of the model is wrapped in the older, flattening FullyShardedDataParallel."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def some(names: list[str], limit: int = 3) -> str:
    """The first few of many names, for an error message."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
