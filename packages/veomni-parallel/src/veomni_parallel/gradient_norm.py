"""The norm of all gradients, exact however they are sharded, and clipping by it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from veomni_parallel.mesh import ParallelState


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, state: ParallelState) -> torch.Tensor:
    """Scale all gradients in place so that their common 2-norm is at most `max_norm`.

    Exact for DDP, FSDP1, FSDP2 and HSDP, with sequence, expert and tensor parallelism, also where parameters lie on
    different meshes: shards are summed over the ranks that hold different ones, replicas are counted once. Sums over
    ranks are taken in the order of ranks, so the same gradients give the same bits on every rank and in every run, and
    the host waits for no device. `max_norm=math.inf` only measures.

    Returns:
        The norm before clipping, a 0-dimensional float32 tensor on this rank's device, equal on all ranks.
    """
    # gradients by the groups that their shards are summed over; one key, and one exchange, per way of sharding
    by_sharding: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    fsdp1_group = state.fsdp.get_group() if isinstance(model, FullyShardedDataParallel) else None
    for parameter in model.parameters():
        groups: tuple[Any, ...] = () if fsdp1_group is None else (fsdp1_group,)
        gradient = parameter.grad
        if isinstance(parameter, DTensor):
            placements = enumerate(parameter.placements)
            sharded = [dim for dim, placement in placements if not isinstance(placement, Replicate)]
            groups = tuple(parameter.device_mesh.get_group(dim) for dim in sharded)
            gradient = gradient.to_local() if gradient is not None else None
        # the key exists on every rank, also where this rank has no gradient: all ranks must exchange alike
        if parameter.requires_grad:
            by_sharding.setdefault(groups, [])
            if gradient is not None:
                by_sharding[groups].append(gradient)

    total = torch.zeros((), dtype=torch.float64, device=state.device)
    for groups, gradients in by_sharding.items():
        squares = torch.zeros_like(total)
        if gradients:
            squares += torch.stack(torch._foreach_norm(gradients, 2.0, torch.float32)).double().square().sum()
        for group in groups:
            parts = [torch.empty_like(squares) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, squares, group=group)
            squares = torch.stack(parts).sum()
        total += squares
    norm = total.sqrt().float()

    if gradients := [gradient for group in by_sharding.values() for gradient in group]:
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # CPU offload: gradients are not on the device
    return norm
