"""What the data-parallel ranks tell each other at every step: whether it is made, and rows that another is to have."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .balance import Outlook, deal_rows
from .encoding import from_wire, to_wire
from .rows import Row
from .shards import VirtualShard


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


def sum_values(own: Sequence[float], group: Any) -> list[float]:
    """The sums of each of these numbers over the ranks; the own ones without a group."""
    if group is None:
        return list(own)
    values = torch.tensor(own, dtype=torch.float64, device=_device(group))
    dist.all_reduce(values, group=group)
    found: list[float] = values.tolist()
    return found


def exchange_rows(have: Mapping[int, Row], rows: int, group: Any, by_cost: bool) -> list[tuple[int, Row | None]]:
    """Deal the rows of a step to the ranks.

    Args:
        have: this rank's rows by their place in the step.
        rows: of the step, over all ranks.
        by_cost: whether each rank is to have about the same work, and its dearest rows first; else the places of a rank
            follow each other.

    Returns:
        The place and row of each row that this rank is to have, None where one is missing; all ranks have the same
        number of places.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if by_cost:
        costs = sum_values([sum(i.cost for i in have.get(place) or ()) for place in range(rows)], group)
        dealt = deal_rows(costs, ranks, rows // ranks)
    else:
        dealt = [list(range(first, first + rows // ranks)) for first in range(0, rows, rows // ranks)]
    parcels = []
    for to in range(ranks):
        moved = {place: have[place] for place in dealt[to] if place in have and to != rank}
        wire = {p: [i._replace(sample=to_wire(i.sample)) for i in row] for p, row in moved.items()}
        parcels.append(pickle.dumps(wire, protocol=5) if wire else b"")
    found: dict[int, Row] = dict(have)
    for parcel in _exchange_bytes(parcels, group):
        for place, row in (pickle.loads(parcel) if parcel else {}).items():
            found[place] = [item._replace(sample=from_wire(item.sample)) for item in row]
    return [(place, found.get(place)) for place in dealt[rank]]


def fill_up(
    have: dict[int, Row | None],
    shards: Sequence[VirtualShard],
    step: int,
    make: Callable[[list[VirtualShard]], list[Row | None]],
    group: Any,
) -> list[int | None]:
    """Put further rows of the shards that have more into the places, in a step, of those that have none left.

    The shards give in turn, from another one on at every step. Which they are does not depend on the ranks.

    Args:
        have: this rank's rows by place, which is the number of their shard; those that its shards give more are added.
        shards: of this rank.
        step: its number.
        make: a row more of each of these shards; called on all ranks the same number of times.

    Returns:
        The shard that gives the row of each place of the step; None if nothing is left for it.
    """
    rows = int(sum_values([len(have)], group)[0])
    there = sum_values([have.get(place) is not None for place in range(rows)], group)
    givers = [place if has else None for place, has in enumerate(there)]
    empty = deque(place for place, giver in enumerate(givers) if giver is None)
    turn = deque(sorted((g for g in givers if g is not None), key=lambda shard: (shard - step) % rows))
    while empty and turn:
        asked = [turn.popleft() for _ in range(min(len(empty), len(turn)))]
        own = [shard for shard in shards if shard.number in asked]
        made = {shard.number: row for shard, row in zip(own, make(own), strict=True)}
        gave = sum_values([made.get(number) is not None for number in asked], group)
        for number in compress(asked, gave):
            place = empty.popleft()
            givers[place] = number
            turn.append(number)
            if number in made:
                have[place] = made[number]
    return givers


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
