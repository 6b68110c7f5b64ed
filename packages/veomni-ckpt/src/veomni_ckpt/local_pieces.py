"""Which boxes of a tensor a rank holds, whatever way it is sharded."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.lazy_tensors import Box, whole_box


def local_pieces(tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
    """This rank's part of a tensor: boxes of the whole, and views of the memory that holds them.

    Args:
        tensor: a plain one, which is one box; a DTensor of any mesh, divided along any dimensions, with
            `_StridedShard` (packed weights under tensor parallelism, FSDP2 over it) too; FSDP1's ShardedTensor.

    Raises:
        CheckpointError: a DTensor of partial sums, or one whose local part is not what its placements say.
    """
    if isinstance(tensor, ShardedTensor):
        shards = [(shard.metadata, shard.tensor) for shard in tensor.local_shards()]
        return [(tuple(zip(m.shard_offsets, m.shard_sizes, strict=True)), part.detach()) for m, part in shards]
    if not isinstance(tensor, DTensor):
        return [(whole_box(tensor.shape), tensor.detach())]
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(f"a DTensor has partial sums ({tensor.placements}), which belong to no rank")
    if tensor.device_mesh.get_coordinate() is None:
        return []
    local = tensor.detach().to_local()
    runs = [_runs(_indices(tensor, dim)) for dim in range(tensor.dim())]
    sizes = [sum(size for _, size in own) for own in runs]
    if sizes != list(local.shape):
        raise CheckpointError(
            f"a DTensor of {list(tensor.shape)} as {tensor.placements} has {list(local.shape)} here, not {sizes}"
        )
    pieces = []
    for chosen in product(*([(begin, run) for begin, run in _with_begins(own)] for own in runs)):
        piece = local
        for dim, (begin, (_, size)) in enumerate(chosen):
            piece = piece.narrow(dim, begin, size)
        pieces.append((tuple(run for _, run in chosen), piece))
    return pieces


def _indices(tensor: DTensor, dim: int) -> torch.Tensor:
    """The indices of one dimension that this rank holds, in its order: the placements' own division of them."""
    mesh, indices = tensor.device_mesh, torch.arange(tensor.size(dim))
    for number, placement in enumerate(tensor.placements):
        divides: Any = None
        if isinstance(placement, Shard | _StridedShard) and placement.dim % tensor.dim() == dim:
            strided = isinstance(placement, _StridedShard)
            divides = _StridedShard(0, split_factor=placement.split_factor) if strided else Shard(0)
        if divides is not None:
            parts, _ = divides._split_tensor(indices, mesh.size(number), with_padding=False, contiguous=False)
            indices = parts[mesh.get_local_rank(number)]
    return indices


def _runs(indices: torch.Tensor) -> list[tuple[int, int]]:
    """(first, number) of the consecutive indices."""
    if not len(indices):
        return []
    ends = (torch.nonzero(indices.diff() != 1).flatten() + 1).tolist()
    return [(int(indices[begin]), end - begin) for begin, end in zip([0, *ends], [*ends, len(indices)], strict=True)]


def _with_begins(runs: list[tuple[int, int]]) -> list[tuple[int, tuple[int, int]]]:
    """Each run with the place where it begins in the local part."""
    begin, result = 0, []
    for run in runs:
        result.append((begin, run))
        begin += run[1]
    return result


def copy_common(source: torch.Tensor, source_box: Box, target: torch.Tensor, target_box: Box) -> None:
    """Copy what two boxes of one tensor have in common from the memory of the first to that of the second."""
    common = intersection(source_box, target_box)
    if common is not None:
        target[within(common, target_box)] = source[within(common, source_box)].to(target.device)


def intersection(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None if that is nothing."""
    common = []
    for (first, size), (other_first, other_size) in zip(one, other, strict=True):
        begin, end = max(first, other_first), min(first + size, other_first + other_size)
        if begin >= end:
            return None
        common.append((begin, end - begin))
    return tuple(common)


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """A box as an index of the memory that holds an outer one."""
    return tuple(
        slice(first - begin, first - begin + size) for (first, size), (begin, _) in zip(box, outer, strict=True)
    )
