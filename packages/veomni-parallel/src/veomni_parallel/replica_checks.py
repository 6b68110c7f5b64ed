"""Looking for what went wrong on one rank: copies of weights that have drifted apart, gradients that are not finite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from veomni_parallel.mesh import ParallelState

_AT_ONCE = 1 << 22  # elements
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class Difference(NamedTuple):
    """A parameter or buffer that is not the same on ranks that should hold the same of it."""

    name: str
    groups: tuple[tuple[int, ...], ...]
    """Ranks that agree with each other, the largest group first; a group of its own for those that lack it."""

    def __str__(self) -> str:
        return f"{self.name} differs between {' and '.join(_ranks(group) for group in self.groups)}"


class NonFinite(NamedTuple):
    """A gradient that is not finite on a rank."""

    name: str
    """Of the parameter; or "the loss"."""
    rank: int
    kind: str
    """"nan", "inf", or "nan and inf"."""
    values: int
    """Values that are not finite in what this rank holds of it."""

    def __str__(self) -> str:
        return f"{self.name} has {self.values:,} {self.kind} on rank {self.rank}"


@torch.no_grad()
def sync_check(model: nn.Module, state: ParallelState) -> list[Difference]:
    """Parameters and buffers that differ between ranks that should hold the same bits of them.

    Whatever a rank holds, whole or a shard, is reduced to 64 bits, which the ranks exchange once. Compared are copies:
    all ranks for what is whole (DDP; parameters that no mesh divides; buffers), for shards the ranks that lie at the
    same place of the dimensions that divide them. A difference is a bug: training goes on, silently, with several
    models. It reads all weights once, so call it every few hundred steps, on every rank.

    Returns:
        The same list on all ranks; empty if all is well.
    """
    own = {name: (key, _checksum(tensor)) for name, key, tensor in _held(model, state)}
    every: list[Any] = [own]
    if state.sizes.world_size > 1:
        every = [None] * state.sizes.world_size
        dist.all_gather_object(every, own)
    found = []
    for name in dict.fromkeys(name for held in every for name in held):
        lacking = tuple(rank for rank, held in enumerate(every) if name not in held)
        copies: dict[Any, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, held in enumerate(every):
            if name in held:
                key, checksum = held[name]
                copies[key][checksum].append(rank)
        for same in copies.values():
            groups = sorted(map(tuple, same.values()), key=lambda ranks: (-len(ranks), ranks))
            if len(groups) > 1:
                found.append(Difference(name, tuple(groups)))
        if lacking:
            having = tuple(rank for rank in range(len(every)) if rank not in lacking)
            found.append(Difference(name, (having, lacking)))
    return found


@torch.no_grad()
def find_nonfinite(model: nn.Module, state: ParallelState, loss: torch.Tensor | None = None) -> list[NonFinite]:
    """Which gradients are not finite, and on which rank, before an optimizer step spreads them over all weights.

    Call it on every rank if the norm that `clip_grad_norm_` gave is not finite, which all ranks see alike; a good step
    does not pay for it. After the reduction a value of one rank is in the sum that all replicas hold, so that the rank
    that it came from is known by its loss: give that.

    Args:
        model: after backward, its gradients as they are.
        state: of the run.
        loss: this rank's own loss of the step, before any sum over ranks.

    Returns:
        The same list on all ranks, losses first; empty if all is finite.
    """
    own = [] if loss is None else [_count("the loss", state.rank, loss.detach())]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            own.append(
                _count(_plain(name), state.rank, gradient.to_local() if isinstance(gradient, DTensor) else gradient)
            )
    bad = [each for each in own if each.values]
    every: list[Any] = [bad]
    if state.sizes.world_size > 1:
        every = [None] * state.sizes.world_size
        dist.all_gather_object(every, bad)
    return sorted((each for of_rank in every for each in of_rank), key=lambda each: each.name != "the loss")


def _held(model: nn.Module, state: ParallelState) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """The name of each parameter and buffer, what of it this rank holds, and that."""
    flat = None
    if isinstance(model, FullyShardedDataParallel):
        flat = ("fsdp", state.fsdp.get_local_rank())
    trained = {name for name, _ in model.named_parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        key: Any = flat if name in trained else None
        if isinstance(tensor, DTensor):
            place = tensor.device_mesh.get_coordinate() or ()
            divided = [dim for dim, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
            key = tuple((str(tensor.placements[dim]), place[dim]) for dim in divided)
            tensor = tensor.to_local()
        yield _plain(name), key, tensor


def _checksum(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], str]:
    """64 bits of the bits of a tensor, which another value anywhere almost surely changes; its shape; and its type."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    width = next(size for size in (4, 2, 1) if raw.numel() % size == 0)
    words = raw.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[width])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _AT_ONCE):
        part = words[start : start + _AT_ONCE].long() + 0x9E3779B9
        place = torch.arange(start, start + part.numel(), device=tensor.device)
        mixed = (part ^ (place * 0x2545F4914F6CDD1D)) * 0x27D4EB2F165667C5  # int64 wraps around
        total += (mixed ^ (mixed >> 29)).sum()
    return int(total), tuple(tensor.shape), str(tensor.dtype)


def _count(name: str, rank: int, tensor: torch.Tensor) -> NonFinite:
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    kind = " and ".join(what for what, count in (("nan", nans), ("inf", infinities)) if count)
    return NonFinite(name, rank, kind, nans + infinities)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
