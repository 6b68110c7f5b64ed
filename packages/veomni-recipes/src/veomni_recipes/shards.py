"""A rank's part of a tensor, and sums over all parts."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over(part: torch.Tensor, like: torch.Tensor, dims: Collection[int]) -> torch.Tensor:
    """The sum over `dims` of what `part` is this rank's part of, with 1 in their place; a collective for shards.

    Args:
        part: laid out as this rank's part of `like`.
        like: the parameter that says which ranks hold the other parts.
        dims: at least one, counted from 0.
    """
    total = part.sum(tuple(dims), keepdim=True)
    if isinstance(like, DTensor):
        for mesh_dim, placement in enumerate(like.placements):
            if getattr(placement, "dim", None) in dims:
                dist.all_reduce(total, group=like.device_mesh.get_group(mesh_dim))
    return total
