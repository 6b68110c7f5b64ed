"""Rows of equal work: a stream's rows that cost what the other rows of their step cost, and rows dealt out to ranks.

Attention costs the square of a sample's length, so that full rows differ: one of a single long sample can take several
times as long as one of many short samples, and every rank waits for the slowest. A row can be made no cheaper than its
longest sample is. So long samples are held back until the rows of one step can all be made about as expensive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import DataError
from .packing import PackingBuffer, pack, sample_length

S = TypeVar("S")

_TOLERANCE = 0.02  # a sample is heavy if its row costs more than this above the usual
_PATIENCE = 6  # a heavy sample waits while this many buffers of samples come in; then its row is asked for
_WINDOW = 2000  # samples of a list that a row is chosen from
_MOST_ROWS = 1.005  # times the fewest
_EXCHANGES = 1000  # of rows between ranks, at most: tens are usual
_PARTNERS = 32  # ranks with the least work that the one with the most may exchange rows with
_EVEN = 1.001  # times the mean work is even enough
_LIMIT = 15  # any sample leads a row, whatever it costs, once this many buffers of samples have come in since


def attention_cost(length: int, hidden_size: int, *, causal: bool = True) -> float:
    """The work of a sample in units of a token's work in the linear layers: `length + length^2 / (12 * hidden_size)`.

    A layer of width H does about 24 H^2 floating-point operations a token in its linear parts (8 H^2 around attention,
    16 H^2 in a feed-forward of 4 H), and attention 4 L^2 H over a sample of L tokens, of which a causal kernel leaves
    out half: 24 H^2 (L + L^2 / 12 H), or 6 H without a causal kernel.
    """
    return length + length * length / ((12 if causal else 6) * hidden_size)


class Outlook(NamedTuple):
    """What the next row of a buffer may cost."""

    usual: float  # a full row like those that are made of most of what is held; 0 if nothing is held
    due: float  # the least that a row costs with the heavy sample that has waited long enough; 0 if none has


class Target(NamedTuple):
    """What each row of a step is to cost, see `step_target`."""

    usual: float
    cost: float  # above `usual` in a step for which heavy samples were held back


def step_target(outlooks: Iterable[Outlook]) -> Target:
    """What the rows of a step are to cost, from the outlooks of all buffers that will give a row to it.

    That is the mean of what is usual, or more where a buffer has a heavy sample that is due: then the others give
    their heavy samples too.
    """
    known = [outlook for outlook in outlooks if outlook.usual > 0]
    usual = sum(outlook.usual for outlook in known) / max(1, len(known))
    return Target(usual, max([usual, *(outlook.due for outlook in known)]))


class BalancedBuffer(PackingBuffer[S]):
    """A packing buffer whose rows are full and cost what the rows of other buffers at the same step cost.

    Several buffers, each of which gives a row to a step, agree on its target first: each tells its `outlook()`,
    `step_target` makes the target of these, and `put` or `pop_row` are called with it. A buffer by itself follows its
    own outlook.

    What a sample costs above as many tokens of light samples is its surplus. A row has a budget of surplus beside its
    capacity; it starts with the oldest sample and goes on with those that use up both. A sample whose surplus alone
    is above the budget of a usual row is heavy: it is held back for a step with a higher target, for a few buffers of
    samples at most.

    Args:
        cost: the work of a sample in any unit, above 0, such as its tokens and their share of attention.
        capacity, buffer_size, length, tokens, max_tokens: as in PackingBuffer.
    """

    def __init__(
        self,
        capacity: int,
        buffer_size: int,
        *,
        cost: Callable[[S], float],
        length: Callable[[S], int] = sample_length,
        tokens: Callable[[S], int] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._cost = cost
        super().__init__(capacity, buffer_size, length=length, tokens=tokens, max_tokens=max_tokens)

    def _clear(self) -> None:
        super()._clear()
        self._new: list[tuple[int, float, int, int]] = []  # not yet in the table
        # a row a sample held: length, cost, arrival, tokens; ascending by length, the oldest last among equals
        self._table: npt.NDArray[np.float64] = np.empty((4, 0))

    def outlook(self, capacity: int | None = None) -> Outlook:
        """What the next row, of this capacity, may cost: decided by what is held now."""
        capacity = self.capacity if capacity is None else capacity
        self._settle()
        if not self._samples:
            return Outlook(0.0, 0.0)
        lengths, costs, arrivals, _ = self._table
        light, surplus = _light(lengths, costs)
        usual = float(costs.sum() / lengths.sum()) * capacity
        for _ in range(2):  # what is usual without the heavy ones, and which are heavy then
            mild = surplus <= usual * (1 + _TOLERANCE) - light * capacity
            if mild.any():
                usual = float(costs[mild].sum() / lengths[mild].sum()) * capacity
        heavy = surplus > usual * (1 + _TOLERANCE) - light * capacity
        due = heavy & (self._next_arrival - arrivals >= _PATIENCE * self.buffer_size)
        return Outlook(usual, float(surplus[due].max()) + light * capacity if due.any() else 0.0)

    def put(self, sample: S, capacity: int | None = None, target: Target | None = None) -> list[S] | None:
        """Take in a sample; returns a finished row or None, as PackingBuffer does.

        Args:
            target: what that row is to cost; None = what is usual here.
        """
        self._hold(sample)
        return self.pop_row(capacity, target) if self._is_ready(capacity) else None

    def pop_row(self, capacity: int | None = None, target: Target | None = None) -> list[S] | None:
        """A row from what is held that costs about the target; None if nothing is held."""
        self._settle()
        if not self._samples:
            return None
        capacity = self.capacity if capacity is None else capacity
        if target is None or not target.usual:  # before the first step no buffer knows what is usual
            target = step_target([self.outlook(capacity)])
        chosen = self._choose(capacity, target)
        taken = self._table[:, chosen]
        self._held_length -= int(taken[0].sum())
        self._held_tokens -= int(taken[3].sum())
        self._table = np.delete(self._table, chosen, axis=1)
        return [self._samples.pop(int(arrival)) for arrival in taken[2]]

    def state_dict(self) -> dict[str, Any]:
        """What is held, `{"samples": [...], "waited": [...]}`, oldest first, and how many samples came in since."""
        waited = [self._next_arrival - arrival for arrival in self._samples]
        return {"samples": list(self._samples.values()), "waited": waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold exactly the samples of a saved state: the rows to come are those that would have come."""
        self._clear()
        last = max(state["waited"], default=0)
        for sample, waited in zip(state["samples"], state["waited"], strict=True):
            self._next_arrival = last - waited
            self._hold(sample)
        self._next_arrival = last

    def _choose(self, capacity: int, target: Target) -> list[int]:
        """Which of the table make the row, the first one first."""
        lengths, costs, arrivals, tokens = self._table
        light, surplus = _light(lengths, costs)
        budget = target.cost - light * capacity
        at = self._lead(arrivals, surplus, target, light * capacity)
        room, tokens_left = float(capacity), np.inf if self.max_tokens is None else self._token_limit(capacity)
        surplus = surplus.copy()
        chosen: list[int] = []
        while True:
            chosen.append(at)
            room -= lengths[at]
            budget -= surplus[at]
            tokens_left -= tokens[at]
            surplus[at] = np.inf  # gone
            end = int(lengths.searchsorted(room, "right")) if room > 0 else 0
            left = surplus[:end]
            if self.max_tokens is not None:
                left = np.where(tokens[:end] <= tokens_left, left, np.inf)
            if not end or np.isinf(least := left[at := int(left.argmin())]):
                return chosen
            if least <= budget:  # else what costs least
                # the sample that lies most in the direction of what is left (Panigrahy, Talwar, Uyeda, Wieder:
                # Heuristics for vector bin packing, 2011), so that room and budget are used up together
                fitting = (left <= budget).nonzero()[0]
                worth = lengths[fitting] * (room / capacity**2) + left[fitting] * (budget / target.cost**2)
                at = int(fitting[worth.argmax()])

    def _lead(
        self,
        arrivals: npt.NDArray[np.float64],
        surplus: npt.NDArray[np.float64],
        target: Target,
        light: float,
    ) -> int:
        """Which of the table a row starts with that costs `light` if there is no surplus in it."""
        oldest = int(arrivals.argmin())
        if self._next_arrival - arrivals[oldest] >= _LIMIT * self.buffer_size:
            return oldest
        heavy = surplus > target.usual * (1 + _TOLERANCE) - light
        fitting = surplus <= target.cost * (1 + _TOLERANCE) - light
        if (heavy & fitting).any():
            return int(np.where(heavy & fitting, surplus, -np.inf).argmax())
        return oldest if heavy.all() else int(np.where(heavy, np.inf, arrivals).argmin())

    def _file(self, sample: S, length: int, tokens: int, arrival: int) -> None:
        cost = float(self._cost(sample))
        if not 0 < cost < np.inf:
            raise DataError(f"a sample costs {cost}: the cost of a sample must be a number above 0")
        self._new.append((length, cost, arrival, tokens))

    def _settle(self) -> None:
        if self._new:
            table = np.concatenate([self._table, np.array(self._new, dtype=np.float64).T], axis=1)
            self._table = table[:, np.lexsort((-table[2], table[0]))]
            self._new = []


def _light(lengths: npt.NDArray[np.float64], costs: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
    """The cost of a token in light samples (the half of them with the cheapest tokens), and each sample's surplus."""
    density = costs / lengths
    half = density <= np.median(density)
    light = float(costs[half].sum() / lengths[half].sum())
    return light, costs - light * lengths


def pack_balanced(lengths: Sequence[int], capacity: int, costs: Sequence[float]) -> list[list[int]]:
    """`pack` with costs: full rows, of which most cost the same, in the order of their cost, the dearest first.

    Heavy samples, whose rows must cost more than the usual row, get the lightest filling. What is left at the end,
    when there is little to choose from, is packed without regard to cost. Where that takes over 0.5 % more rows than
    `pack` without costs (as with lengths so long that hardly two fit a row), the rows are those of `pack`, in the order
    of their cost.

    Raises:
        DataError: a length is below 1 or above `capacity`, or there is not a cost above 0 for each length.
    """
    fullest = pack(lengths, capacity)
    work = np.asarray(costs, dtype=np.float64)
    if work.shape != (len(lengths),) or not ((work > 0) & np.isfinite(work)).all():
        raise DataError(f"there must be a cost above 0 for each of the {len(lengths)} samples")
    rows = _pack_most_alike(np.asarray(lengths, dtype=np.float64), capacity, work) if fullest else []
    if len(rows) > _MOST_ROWS * len(fullest):
        rows = fullest
    return sorted(rows, key=lambda row: -float(work[row].sum()))


def _pack_most_alike(
    lengths: npt.NDArray[np.float64], capacity: int, costs: npt.NDArray[np.float64]
) -> list[list[int]]:
    light, surplus = _light(lengths, costs)
    least = surplus + light * capacity  # the cost of the cheapest full row with a sample
    usual = float(costs.sum() / lengths.sum()) * capacity
    heavy = least > usual * (1 + _TOLERANCE)
    for _ in range(8):  # the heavy rows take their part of the whole cost away, which makes the usual row cheaper
        usual_rows = float(lengths.sum()) / capacity - int(heavy.sum())
        if usual_rows < 1:
            break
        usual = float(costs.sum() - least[heavy].sum()) / usual_rows
        heavy = least > usual * (1 + _TOLERANCE)
    waiting: list[int] = heavy.nonzero()[0].tolist()
    share = len(waiting) * capacity / float(lengths.sum())
    tokens, work = lengths.astype(np.int64).tolist(), costs.tolist()
    buffer = BalancedBuffer[int](capacity, _WINDOW, length=tokens.__getitem__, cost=work.__getitem__)
    rows: list[list[int]] = []
    order = np.random.default_rng(0).permutation(len(lengths))
    for index in order[~heavy[order]].tolist():
        row = buffer.put(index, target=Target(usual, usual))
        if row is None:
            continue
        rows.append(row)
        while waiting and heavy.sum() - len(waiting) < share * len(rows):  # spread evenly among the others
            buffer._hold(waiting[-1])
            rows.append(buffer.pop_row(target=Target(usual, float(least[waiting.pop()]))) or [])
    left = [*waiting, *buffer.state_dict()["samples"]]
    return rows + [[left[i] for i in row] for row in pack([tokens[i] for i in left], capacity)]


def deal_rows(costs: Sequence[float], ranks: int, rows_each: int) -> list[list[int]]:
    """Rows of a step to ranks: to each the same number, and as nearly the same work as can be found quickly.

    The dearest row left goes to the rank with the least work that still has a place (longest processing time first);
    then the rank with the most work exchanges rows with those that have least, as long as that helps. The same costs
    are dealt in the same way on every rank.

    Args:
        costs: of the `ranks * rows_each` rows.

    Returns:
        The indices of each rank's rows, the dearest first, so that micro-batches made at the same time are alike.

    Raises:
        DataError: there are more or fewer rows.
    """
    if ranks < 1 or rows_each < 1 or len(costs) != ranks * rows_each:
        raise DataError(f"{len(costs)} rows cannot be dealt to {ranks} ranks with {rows_each} rows each")
    work = np.asarray(costs, dtype=np.float64)
    open_ranks = [(0.0, rank) for rank in range(ranks)]  # a heap
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for row in np.argsort(-work, kind="stable").tolist():
        load, rank = heappop(open_ranks)
        dealt[rank].append(row)
        if len(dealt[rank]) < rows_each:
            heappush(open_ranks, (load + float(work[row]), rank))
    rows = _exchange(np.array(dealt), work)
    return [sorted(own, key=lambda row: (-work[row], row)) for own in rows.tolist()]


def _exchange(rows: npt.NDArray[np.int64], work: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The rows of each rank [ranks, rows_each] after exchanges of one for one, each of which lowers the most work."""
    for _ in range(_EXCHANGES):
        loads = work[rows].sum(1)
        most, others = int(loads.argmax()), np.argsort(loads, kind="stable")[:_PARTNERS]
        if loads[most] <= _EVEN * loads.mean():
            break
        shed = work[rows[most]][:, None, None] - work[rows[others]]  # [own row, other rank, its row]
        after = np.maximum(loads[most] - shed, loads[others][:, None] + shed)
        own, other, theirs = np.unravel_index(int(after.argmin()), after.shape)
        if after.min() >= loads[most] * (1 - 1e-9):
            break
        there = others[other]
        rows[most, own], rows[there, theirs] = rows[there, theirs], rows[most, own]
    return rows
