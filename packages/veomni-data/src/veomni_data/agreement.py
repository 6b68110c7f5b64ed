"""What the data-parallel ranks tell each other at every step: whether it is made, and rows that another is to have."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .balance import Outlook, deal_rows
from .encoding import from_wire, to_wire
from .rows import Row


class Votes(NamedTuple):
    """A rank's standing, or the sum over all."""

    rows: int  # shards that have a row
    errors: int  # ranks that cannot go on
    paused: int  # ranks that ask whether to
    skipped: int
    seen: int


def sum_votes(own: Votes, group: Any) -> Votes:
    """The votes of all ranks together, by one small all-reduce; the own ones without a group."""
    if group is None:
        return own
    votes = torch.tensor(own, dtype=torch.int64, device=_device(group))
    dist.all_reduce(votes, group=group)
    return Votes(*votes.tolist())


def gather_values(own: Any, group: Any) -> list[Any]:
    """A value of each rank, in their order."""
    if group is None:
        return [own]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, own, group=group)
    return values


def first_value(own: Any, group: Any) -> Any:
    """The value of the first rank."""
    if group is None:
        return own
    values = [own]
    dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0), group=group)
    return values[0]


def gather_outlooks(own: Sequence[Outlook], group: Any) -> list[Outlook]:
    """The outlooks of the shards of all ranks."""
    if group is None:
        return list(own)
    return [Outlook(*pair) for pair in _gather(torch.tensor(own, dtype=torch.float64), group).tolist()]


def exchange_rows(rows: Sequence[Row | None], first: int, group: Any) -> list[tuple[int, Row | None]]:
    """Deal the rows of a step to the ranks so that each has as many as before and about the same work.

    Args:
        rows: of this rank's shards; None where one is missing.
        first: the number of the first shard.

    Returns:
        The shard and row of each row that this rank is to have, the dearest first.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    costs = _gather(torch.tensor([[sum(i.cost for i in row or ())] for row in rows], dtype=torch.float64), group)
    dealt = deal_rows(costs.flatten().tolist(), ranks, len(rows))
    have = {first + at: row for at, row in enumerate(rows)}
    parcels = []
    for to in range(ranks):
        moved = {shard: have[shard] for shard in dealt[to] if shard in have and to != rank}
        wire = {s: row and [i._replace(sample=to_wire(i.sample)) for i in row] for s, row in moved.items()}
        parcels.append(pickle.dumps(wire, protocol=5) if wire else b"")
    for parcel in _exchange_bytes(parcels, group):
        for shard, row in (pickle.loads(parcel) if parcel else {}).items():
            have[shard] = row and [item._replace(sample=from_wire(item.sample)) for item in row]
    return [(shard, have[shard]) for shard in dealt[rank]]


def _gather(own: Tensor, group: Any) -> Tensor:
    """[n, ...] of each rank -> [ranks * n, ...]; all ranks give the same shape."""
    own = own.to(_device(group))
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return torch.cat(parts).cpu()


def _exchange_bytes(parcels: Sequence[bytes], group: Any) -> list[bytes]:
    """A parcel for each rank -> one from each rank."""
    device = _device(group)
    sizes = torch.tensor([len(parcel) for parcel in parcels], dtype=torch.int64, device=device)
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes, group=group)
    incoming = coming.tolist()
    sent = torch.frombuffer(bytearray(b"".join(parcels) or b"\0"), dtype=torch.uint8)[: int(sizes.sum())].to(device)
    got = torch.empty(sum(incoming), dtype=torch.uint8, device=device)
    dist.all_to_all_single(got, sent, incoming, sizes.tolist(), group=group)
    received = got.cpu().numpy().tobytes()
    ends = torch.tensor(incoming).cumsum(0).tolist()
    return [received[end - size : end] for end, size in zip(ends, incoming, strict=True)]


def _device(group: Any) -> torch.device | str:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
