"""Deal the samples of a step to the ranks so that each kind of work is even, whatever the encoders are."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from veomni_parallel.errors import ParallelError
from veomni_parallel.mesh import Mesh

T = TypeVar("T")
_MOVES = 500  # of the local search after the first deal
_PARTNERS = 8  # ranks with which the slowest exchanges samples, those with the least work
_EVEN = 1.005  # the slowest rank's work in that of the mean: more is not asked for


def balance_over_ranks(costs: torch.Tensor | Sequence[Any], mesh: Mesh) -> tuple[Exchange, Exchange]:
    """Deal the samples of a step to the ranks so that no rank waits for another, neither in an encoder nor after it.

    Ranks meet in every unit of a sharded model, so a step takes as long as the slowest rank's pictures and then as long
    as the slowest rank's text: each column of the costs is made even by itself, as far as the samples allow, and the
    columns are weighed by how much work they are. Who has which sample changes no loss and no gradient, as losses are
    divided by the targets of the whole step.

    Every rank calls it together. One small exchange tells all costs, the dealing is the same everywhere, and each call
    of the result moves its payload in one all-to-all.

    Args:
        costs: [n] or [n, kinds], the work of each of this rank's samples, in one unit for all kinds (seconds, by
            `fit_costs`, or floating-point operations); ranks may have different numbers of samples, or none.
        mesh: the ranks that have different samples, `state.dp`.

    Returns:
        exchange: this rank's samples (dictionaries or sequences of tensors and plain values, or tensors) -> those that
            it is to compute. Gradients flow back through tensors.
        inverse: what was computed of them, one for each -> the same for the samples that this rank had, in their order.

    Raises:
        ParallelError: costs are not [n] or [n, kinds] with the same kinds on all ranks, or are negative or not finite.
    """
    own = torch.as_tensor(costs, dtype=torch.float64, device="cpu")
    own = own[:, None] if own.ndim == 1 else own
    every = [own] if mesh.size() == 1 else _gather(own, mesh.get_group())
    # an empty list says nothing of kinds
    kinds = {part.shape[1] for part in every if part.ndim == 2 and len(part)}
    if any(part.ndim != 2 for part in every) or len(kinds) > 1:
        raise ParallelError(
            "Costs are [n] or [n, kinds], with the same kinds on all ranks, but the ranks gave "
            + ", ".join(str(list(part.shape)) for part in every)
            + "."
        )
    whole = torch.cat([part for part in every if len(part)] or [torch.zeros(0, 1, dtype=torch.float64)])
    if not (whole.isfinite() & (whole >= 0)).all():
        raise ParallelError("The cost of a sample must be a finite number from 0 up.")
    counts = [len(part) for part in every]
    dealt = deal_samples(whole, counts)
    first = [sum(counts[:rank]) for rank in range(len(counts))]
    owner = [rank for rank, count in enumerate(counts) for _ in range(count)]
    routes = tuple(
        tuple(tuple(sample - first[source] for sample in taken if owner[sample] == source) for taken in dealt)
        for source in range(len(counts))
    )
    loads = torch.stack([whole[taken].sum(0) for taken in dealt])
    before = torch.stack([part.sum(0) for part in whole.split(counts)])
    exchange = Exchange(routes, mesh, before, loads)
    return exchange, exchange.inverse


def deal_samples(costs: torch.Tensor, counts: Sequence[int]) -> list[list[int]]:
    """Which samples each rank is to have; the same on every rank.

    The dearest sample that is left goes where it raises the sum of squared work least (of each kind and of all), then
    samples move and swap between ranks as long as that lowers the sum, over the kinds, of the slowest rank's work. Of
    the parts that arise, each rank takes the one of which it has most already.

    Args:
        costs: [n, kinds] of all samples, those of rank 0 first, float64 on the CPU.
        counts: samples that each rank has; sums to n.

    Returns:
        For each rank its samples' indices, ascending.
    """
    ranks, samples = len(counts), len(costs)
    if ranks == 1:
        return [list(range(samples))]
    work = torch.cat([costs, costs.sum(1, keepdim=True)], dim=1)  # [n, kinds + 1]: the whole counts as a kind
    loads = torch.zeros(ranks, work.shape[1], dtype=torch.float64)
    place = torch.zeros(samples, dtype=torch.int64)
    sizes = [0] * ranks
    for sample in work[:, -1].argsort(descending=True, stable=True).tolist():
        growth = loads @ work[sample]
        rank = min(range(ranks), key=lambda r: (float(growth[r]), sizes[r]))
        place[sample], loads[rank] = rank, loads[rank] + work[sample]
        sizes[rank] += 1
    _improve(place, costs, ranks)
    return _name_parts(place, costs, counts)


def fit_costs(amounts: torch.Tensor | Sequence[Any], seconds: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """Seconds for each amount of something, from measured steps: non-negative least squares, by active sets.

    Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23.

    Args:
        amounts: [steps, kinds], what was computed in each measured step: for example its patches, the squares of its
            pictures' patches, its tokens and the squares of its samples' lengths, and 1 for what every step takes.
        seconds: [steps], how long it took.

    Returns:
        [kinds] float64, so that `amounts @ fit_costs(amounts, seconds)` is near `seconds`; none is negative.

    Raises:
        ParallelError: there are fewer steps than kinds, or the shapes do not fit.
    """
    a = torch.as_tensor(amounts, dtype=torch.float64, device="cpu")
    b = torch.as_tensor(seconds, dtype=torch.float64, device="cpu")
    if a.ndim != 2 or b.shape != a.shape[:1] or len(a) < a.shape[1]:
        raise ParallelError(
            f"Costs are fitted to amounts [steps, kinds] and seconds [steps], with at least as many steps as kinds, not"
            f" to {list(a.shape)} and {list(b.shape)}."
        )
    scale = a.abs().amax(0).clamp(min=1e-300)
    a = a / scale
    found, active = torch.zeros(a.shape[1], dtype=torch.float64), torch.zeros(a.shape[1], dtype=torch.bool)
    tolerance = 1e-10 * float((a.T @ b).abs().max().clamp(min=1e-300))
    for _ in range(3 * a.shape[1]):
        gradient = (a.T @ (b - a @ found)).masked_fill(active, -torch.inf)
        if float(gradient.max()) <= tolerance:
            break
        active[int(gradient.argmax())] = True
        while True:
            solved = torch.zeros_like(found)
            solved[active] = torch.linalg.lstsq(a[:, active], b[:, None], driver="gelsd").solution[:, 0]
            if bool((solved[active] > 0).all()):
                break
            back = active & (solved <= 0)
            share = float((found[back] / (found[back] - solved[back]).clamp(min=1e-300)).min())
            found = found + share * (solved - found)
            active &= found > 1e-14
            found = found.where(active, 0.0)
        found = solved
    return found / scale


@dataclass(frozen=True)
class Exchange:
    """Moves one thing for each sample between ranks; made by `balance_over_ranks`."""

    routes: tuple[tuple[tuple[int, ...], ...], ...]
    """`routes[source][target]`: which of the source's samples go to the target, in this order."""
    mesh: Mesh
    before: torch.Tensor
    """[ranks, kinds] float64, the work of each rank as it was."""
    after: torch.Tensor
    """[ranks, kinds] float64, the work of each rank as it is dealt."""
    returning: bool = False

    @property
    def inverse(self) -> Exchange:
        """The way back."""
        return Exchange(self.routes, self.mesh, self.after, self.before, not self.returning)

    def __call__(self, samples: Sequence[T]) -> list[T]:
        """What this rank has afterwards; every rank calls it together.

        Args:
            samples: one thing for each sample: a tensor, or dictionaries, lists and tuples of tensors and plain values.

        Raises:
            ParallelError: there is not one for each sample; or tensors have gradients and some rank is handed none of
                them, which `with_anchor` allows.
        """
        return self._move(samples, None)[0]

    def with_anchor(self, samples: Sequence[T], anchor: torch.Tensor) -> tuple[list[T], torch.Tensor]:
        """The same where some ranks may be handed nothing, such as a rank without pictures its features.

        Gradients travel back by a collective, in which a rank takes part only if its loss depends on what it was
        handed. So it is handed `anchor` back, too.

        Args:
            samples: as above.
            anchor: a tensor with a gradient on which this rank's loss depends, such as its embedded tokens.

        Returns:
            What this rank has afterwards, and `anchor`, to be used in its place.
        """
        moved, tied = self._move(samples, anchor)
        assert tied is not None
        return moved, tied

    def _move(self, samples: Sequence[Any], anchor: torch.Tensor | None) -> tuple[list[Any], torch.Tensor | None]:
        rank, routes = self.mesh.get_local_rank(), self.routes
        sends, receives = list(routes[rank]), [routes[source][rank] for source in range(len(routes))]
        if self.returning:
            # what came lies in the order of its sources, and goes back to where it was taken from
            ends = [0, *accumulate(map(len, receives))]
            sends, receives = [tuple(range(begin, end)) for begin, end in pairwise(ends)], sends
        if len(samples) != sum(map(len, sends)):
            raise ParallelError(f"This rank has {sum(map(len, sends))} samples to exchange but gave {len(samples)}.")
        arrived = [[samples[i] for i in send] for send in sends]
        if self.mesh.size() > 1:
            arrived, anchor = _exchange(arrived, self.mesh, anchor)
        if not self.returning:
            return [sample for parcel in arrived for sample in parcel], anchor
        back: list[Any] = [None] * sum(map(len, receives))
        for places, parcel in zip(receives, arrived, strict=True):
            for place, sample in zip(places, parcel, strict=True):
                back[place] = sample
        return back, anchor


class _Placeholder(NamedTuple):
    """Where a tensor stood in a sample."""

    shape: torch.Size
    dtype: torch.dtype
    needs_grad: bool


def _improve(place: torch.Tensor, costs: torch.Tensor, ranks: int) -> None:
    """Move and swap samples, in place, while that lowers the work of the slowest ranks, summed over the kinds."""
    loads = torch.zeros(ranks, costs.shape[1], dtype=torch.float64).index_add_(0, place, costs)
    nothing = torch.zeros(1, costs.shape[1], dtype=torch.float64)
    for _ in range(_MOVES):
        if (loads.amax(0) <= _EVEN * loads.mean(0)).all():
            return
        gain, move = 1e-9 * float(loads.sum()), None
        for kind in range(costs.shape[1]):
            most = int(loads[:, kind].argmax())
            mine = (place == most).nonzero()[:, 0]
            for other in loads[:, kind].argsort()[:_PARTNERS].tolist():
                if other == most:
                    continue
                theirs = (place == other).nonzero()[:, 0]
                rest = loads.clone()
                rest[[most, other]] = 0.0
                # a sample of the slowest rank for one of the other's, or for nothing: [mine, theirs + 1, kinds]
                shed = costs[mine][:, None] - torch.cat([costs[theirs], nothing])[None]
                pair = torch.stack([loads[most] - shed, loads[other] + shed])
                slowest = torch.maximum(pair.amax(0), rest.amax(0)).sum(-1)
                gains = loads.amax(0).sum() - slowest
                if float(gains.max()) > gain:
                    gain = float(gains.max())
                    i, j = divmod(int(gains.argmax()), len(theirs) + 1)
                    move = (int(mine[i]), most, other, int(theirs[j]) if j < len(theirs) else None)
        if move is None:
            return
        sample, most, other, swapped = move
        place[sample] = other
        if swapped is not None:
            place[swapped] = most
        loads = torch.zeros_like(loads).index_add_(0, place, costs)


def _name_parts(place: torch.Tensor, costs: torch.Tensor, counts: Sequence[int]) -> list[list[int]]:
    """Give each part to the rank that has most of it already."""
    ranks = len(counts)
    owner = torch.repeat_interleave(torch.arange(ranks), torch.tensor(list(counts)))
    kept = torch.zeros(ranks, ranks, dtype=torch.float64)
    kept.index_put_((place, owner), costs.sum(1) + 1e-12, accumulate=True)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for _ in range(ranks):
        part, rank = divmod(int(kept.argmax()), ranks)
        dealt[rank] = (place == part).nonzero()[:, 0].tolist()
        kept[part], kept[:, rank] = -1.0, -1.0
    return dealt


def _gather(own: torch.Tensor, group: Any) -> list[torch.Tensor]:
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    return every


def _exchange(
    parcels: list[list[Any]], mesh: Mesh, anchor: torch.Tensor | None
) -> tuple[list[list[Any]], torch.Tensor | None]:
    """A list of samples for each rank -> one from each rank, by one all-to-all of the tensors' bytes."""
    group: Any = mesh.get_group()
    tensors: list[torch.Tensor] = []
    skeletons = [_map(parcel, lambda t: _taken(t, tensors), torch.Tensor) for parcel in parcels]
    sent = [_placeholders(skeleton) for skeleton in skeletons]
    learns = [any(p.needs_grad for p in placeholders) for placeholders in sent]
    every: list[Any] = [None] * mesh.size()
    own = [pickle.dumps(skeleton) for skeleton in skeletons], learns, anchor is not None
    dist.all_gather_object(every, own, group=group)
    handed = [any(of_rank[1][rank] for of_rank in every) for rank in range(mesh.size())]
    for rank, (_, _, anchored) in enumerate(every):
        if any(handed) and not handed[rank] and not anchored:
            raise ParallelError(
                f"Rank {rank} of the exchange is handed no tensor with a gradient, so that it would not take part in"
                " the exchange of gradients, for which the others wait: call `with_anchor`."
            )
    coming = [pickle.loads(of_rank[0][mesh.get_local_rank()]) for of_rank in every]
    awaited = [_placeholders(skeleton) for skeleton in coming]
    device = tensors[0].device if tensors else torch.device(mesh.device_type)
    # also a rank that sends nothing with a gradient has one to send back
    tie = torch.zeros((), device=device, requires_grad=any(handed)) if anchor is None else anchor
    tied, *moved = _ExchangeTensors.apply(sent, awaited, group, device, tie, *tensors)
    arrived = iter(moved)
    return [_map(skeleton, lambda _: next(arrived), _Placeholder) for skeleton in coming], tied


def _taken(tensor: torch.Tensor, tensors: list[torch.Tensor]) -> _Placeholder:
    tensors.append(tensor)
    return _Placeholder(tensor.shape, tensor.dtype, tensor.requires_grad)


def _map(value: Any, of: Callable[[Any], Any], kind: type) -> Any:
    """The same nested value with all of a kind in it replaced, in a fixed order."""
    if isinstance(value, kind):
        return of(value)
    if isinstance(value, dict):
        return {key: _map(part, of, kind) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(part, of, kind) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(part, of, kind) for part in value)
    return value


def _placeholders(skeleton: Any) -> list[_Placeholder]:
    found: list[_Placeholder] = []
    _map(skeleton, found.append, _Placeholder)
    return found


class _ExchangeTensors(torch.autograd.Function):
    """Tensors for each rank -> those from each rank; backward sends their gradients back."""

    @staticmethod
    def forward(
        ctx: Any,
        sent: list[list[_Placeholder]],
        awaited: list[list[_Placeholder]],
        group: Any,
        device: torch.device,
        tie: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.sent, ctx.awaited, ctx.group, ctx.device = sent, awaited, group, device
        arrived = _send_bytes(tensors, sent, awaited, group, device)
        flat = [placeholder for of_rank in awaited for placeholder in of_rank]
        ctx.mark_non_differentiable(*(t for t, p in zip(arrived, flat, strict=True) if not p.needs_grad))
        return tie.view_as(tie), *arrived

    @staticmethod
    def backward(ctx: Any, tie: torch.Tensor, *gradients: torch.Tensor) -> tuple[Any, ...]:
        flat = [placeholder for of_rank in ctx.awaited for placeholder in of_rank]
        own = [g for g, p in zip(gradients, flat, strict=True) if p.needs_grad]
        sent = [[p for p in of_rank if p.needs_grad] for of_rank in ctx.awaited]
        awaited = [[p for p in of_rank if p.needs_grad] for of_rank in ctx.sent]
        arrived = iter(_send_bytes(own, sent, awaited, ctx.group, ctx.device))
        back = [next(arrived) if p.needs_grad else None for of_rank in ctx.sent for p in of_rank]
        return None, None, None, None, tie, *back


def _send_bytes(
    tensors: Sequence[torch.Tensor],
    sent: list[list[_Placeholder]],
    awaited: list[list[_Placeholder]],
    group: Any,
    device: torch.device,
) -> list[torch.Tensor]:
    raw = [t.detach().to(device).contiguous().reshape(-1).view(torch.uint8) for t in tensors]
    packed = torch.cat(raw) if raw else torch.empty(0, dtype=torch.uint8, device=device)
    send, receive = ([sum(map(_bytes, of_rank)) for of_rank in each] for each in (sent, awaited))
    got = torch.empty(sum(receive), dtype=torch.uint8, device=device)
    dist.all_to_all_single(got, packed, receive, send, group=group)
    flat = [placeholder for of_rank in awaited for placeholder in of_rank]
    parts = got.split([_bytes(placeholder) for placeholder in flat])
    # a copy, as a view of bytes must begin where its type may
    return [part.clone().view(p.dtype).view(p.shape) for part, p in zip(parts, flat, strict=True)]


def _bytes(placeholder: _Placeholder) -> int:
    return placeholder.shape.numel() * placeholder.dtype.itemsize
