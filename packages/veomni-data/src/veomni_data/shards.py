"""The virtual shards of an epoch: fixed parts of all sources, each of which gives one row a step, as long as it can.

There are as many as rows in a step, whatever the number of ranks, workers and micro-batches, so that none of these
changes which samples a step is made of, and a state saved by N ranks is that of any M.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .balance import BalancedBuffer, Outlook, Target
from .counts import Counts
from .encoding import Example, Request
from .errors import DataError
from .lane import Lane, Plan
from .multisource import Draws, choose
from .rows import Fault, Item, Row, example_name, item_place
from .source import Part, Ref

ShardState = dict[str, Any]
_FORESEEN = 256  # draws that are looked ahead for what to ask for


class Paused:
    """What `next_row` gives when it stops to let the ranks agree on whether to go on."""


PAUSED: Final = Paused()


class Ask(NamedTuple):
    """A request of a shard, and where what it gives belongs."""

    shard: VirtualShard
    request: Request
    serial: int  # of the examples of its source in this shard; -1: it was held back
    passes: int


class VirtualShard:
    """Turns the examples of its part of an epoch into rows, one after the other, in its own order.

    Which source an example is of is decided when it is put, by a random number for its place in the shard and the
    weights of the present step, so that it does not matter what was asked for ahead.

    Args:
        plan: of the epoch.
        state: `fresh_state` or where to go on; what was held back then is to be given by `arrive` first.
        step: steps of the epoch that are made, of which the weights of a mixture and a budget depend; to be kept true.
    """

    def __init__(self, plan: Plan, state: ShardState, step: int = 0) -> None:
        self.number: int = state["shard"]
        self.counts = Counts.from_state(state.get("counts", {}))
        self.step = step
        self.faults: list[Fault] = []  # since they were last taken
        self.left_out: list[Fault] = []  # whole examples that gave no sample, or only such that were too long, likewise
        self.urgent: deque[Ask] = deque()  # without these the next row cannot be made
        self._plan = plan
        self._rules = plan.rules
        self._numbers = Draws(plan.seed, plan.epoch, self.number)
        self._draws: int = state.get("draws", 0)
        self._foreseen: deque[int] = deque()  # the sources of the draws to come, as it seems now
        self._current: int | None = state.get("current")  # the source of the example that is being put
        self._piece: int = state.get("piece", 0)  # samples of it that are put
        self._over: bool = state.get("over", False)  # whether every example is put
        self._held: list[Any] = state.get("held", [])
        self._waited: list[int] = state.get("waited", [])
        self._found: dict[str, Example] = {}  # what was held back, by source, pass and ref
        self.to_refill = len(self.held_back())  # examples that were held back and are not here yet
        of_lanes = state.get("lanes") or [{}] * len(plan.sources)
        self._lanes = [Lane(plan, self.number, i, lane) for i, lane in enumerate(of_lanes)]
        self._resuming = self._current is not None  # its example is to be read again
        self._buffer = plan.rules.buffer()

    def state_dict(self) -> ShardState:
        """What is put and what is held back, however far ahead examples were asked for; JSON-able."""
        held, waited = self._held, self._waited
        if self._buffer is not None and not self._held:
            buffer = self._buffer.state_dict()
            held, waited = [item.key for item in buffer["samples"]], buffer.get("waited", [])
        state: ShardState = {"shard": self.number, "counts": self.counts.state_dict()}
        state |= {"draws": self._draws, "current": self._current, "piece": self._piece, "over": self._over}
        state |= {"lanes": [lane.state_dict() for lane in self._lanes], "held": held}
        return state | ({"waited": waited} if waited else {})

    @property
    def ahead(self) -> int:
        """Examples and samples asked for and not yet in a row."""
        return sum(len(lane.waiting) for lane in self._lanes) + (len(self._buffer) if self._buffer is not None else 0)

    @property
    def unused(self) -> int:
        """Examples asked for and not put."""
        return sum(len(lane.waiting) for lane in self._lanes)

    @property
    def to_fill(self) -> int:
        """Samples that the buffer lacks."""
        return 0 if self._buffer is None else max(0, self._buffer.buffer_size - len(self._buffer))

    def held_back(self) -> list[tuple[int, int, Ref]]:
        """The source, passes and ref of each example that was held back when the state was saved."""
        found = {}
        for key in self._held:
            ref, _, _, source, passes = item_place(key)
            found[example_name(source, passes, ref)] = (source, passes, ref)
        return list(found.values())

    def fetcher(self, source: int, passes: int) -> Part:
        """A part of a source of which held-back examples can be fetched."""
        return self._lanes[source].fetcher(passes)

    def ask(self) -> Ask | None:
        """What is best asked for next: what is waited for, or else what will be drawn; None if that is all here."""
        self._read_current()
        if self.urgent:
            return self.urgent.popleft()
        while not self._over and len(self._foreseen) < _FORESEEN:
            source = self._choose(self._draws + len(self._foreseen), ahead=True)
            if source is None:
                return None
            lane = self._lanes[source]
            if lane.dry and self._ends_with_first:
                return None
            self._foreseen.append(source)
            lane.expected += 1
            if lane.expected <= len(lane.waiting) - (source == self._current):
                continue  # asked for already, when something else was foreseen
            if (request := lane.pull()) is not None:
                return self._as_ask(lane, request)
            if all(lane.dry for lane in self._lanes):
                return None
        return None

    def arrive(self, ask: Ask, example: Example) -> None:
        """Take in what a request of this shard gave."""
        if ask.serial < 0:
            self._found[example_name(ask.request.source, ask.passes, ask.request.ref)] = example
            self.to_refill -= 1
            if not self.to_refill:
                self._refill()
        else:
            self._lanes[ask.request.source].arrived[ask.serial] = example

    def outlook(self) -> Outlook:
        """What the next row may cost; only of shards whose rules have a cost."""
        if isinstance(self._buffer, BalancedBuffer):
            return self._buffer.outlook(self._rules.capacity(self._plan.first_step + self.step))
        return Outlook(0.0, 0.0)

    def next_row(
        self, wait: Callable[[], None], target: Target | None = None, pause: Callable[[], bool] = lambda: False
    ) -> Row | Paused | None:
        """The next row; None if this part of the epoch is used up.

        Args:
            wait: waits until something has arrived.
            target: what the row is to cost, see `step_target`.
            pause: asked after an example was skipped: whether to stop for now; the next call goes on.
        """
        while self.to_refill:
            wait()
        self._read_current()
        while True:
            if self._current is None and not self._draw():
                return self._pop_row(target)
            assert self._current is not None
            lane = self._lanes[self._current]
            while lane.head not in lane.arrived:
                wait()
            example, ref, done = lane.arrived[lane.head], lane.waiting[0], None
            if self._piece == 0:
                self._see(example, lane, ref)
            if self._piece < len(example.samples):
                done = self._put(self._rules.item(example.samples, self._piece, lane.source, lane.passes, ref), target)
                self._piece += 1
            if self._piece >= len(example.samples):
                lane.put()
                self._current, self._piece = None, 0
            if done is not None:
                return done
            if example.fault is not None and pause():
                return PAUSED

    @property
    def _ends_with_first(self) -> bool:
        return self._plan.mixture is not None and self._plan.mixture.stopping == "first_exhausted"

    def _as_ask(self, lane: Lane, request: Request) -> Ask:
        return Ask(self, request, lane.head + len(lane.waiting) - 1, lane.passes)

    def _read_current(self) -> None:
        """Ask again for the example that was being put when the state was saved: after what was held back was read."""
        if self._resuming and self._current is not None:
            self._resuming = False
            if not self._pull_urgently(self._lanes[self._current]):
                name = self._plan.sources[self._current].name
                raise DataError(f'"{name}" has fewer examples than when the state was saved')

    def _pull_urgently(self, lane: Lane) -> bool:
        request = lane.pull()
        if request is not None:
            self.urgent.append(self._as_ask(lane, request))
        return request is not None

    def _draw(self) -> bool:
        """Decide which source the next example is of, and see to it that it is asked for; False if there is none."""
        while not self._over:
            source = self._choose(self._draws)
            if source is None:
                self._over = True
                break
            self._draws += 1
            if self._foreseen:
                self._lanes[self._foreseen.popleft()].expected -= 1
            lane = self._lanes[source]
            if lane.waiting or self._pull_urgently(lane) or self._end_pass(lane):
                self._current = source
                return True
        return False

    def _choose(self, draw: int, ahead: bool = False) -> int | None:
        if self._plan.mixture is not None:
            weights = self._plan.mixture.weights(self._plan.first_step + self.step)
            if any(lane.empty for lane in self._lanes):
                weights = tuple(0.0 if lane.empty else w for w, lane in zip(weights, self._lanes, strict=True))
        elif len(self._lanes) == 1:
            return None if self._lanes[0].whole or (ahead and self._lanes[0].dry) else 0
        else:
            # what is left of each: so any order of all examples is as likely as any other
            weights = tuple(self._left(lane, ahead) for lane in self._lanes)
        return choose(weights, self._numbers[draw])

    def _left(self, lane: Lane, ahead: bool) -> float:
        if lane.whole or (ahead and lane.dry):
            return 0.0
        if any(source.rows is None for source in self._plan.sources):
            return lane.amount
        drawn = lane.taken + (lane.expected + (lane.source == self._current) if ahead else 0)
        return max(0.0, lane.amount - drawn)

    def _end_pass(self, lane: Lane) -> bool:
        """A source has no more in this pass; whether it gives an example of its next."""
        lane.whole = True
        mixture = self._plan.mixture
        if mixture is None:
            return False
        if mixture.stopping == "first_exhausted":
            self._over = True
        elif mixture.stopping == "all_exhausted":
            drawable = mixture.drawable(self._plan.first_step + self.step)
            self._over = all(each.whole or not d for each, d in zip(self._lanes, drawable, strict=True))
        request = None if self._over else lane.begin_again()
        if request is not None:
            self.urgent.append(self._as_ask(lane, request))
        return request is not None

    def _see(self, example: Example, lane: Lane, ref: Ref) -> None:
        self.counts.seen += 1
        if example.fault is not None:
            self._skip(lane.source, lane.passes, ref, example.fault)
            return
        if example.fate is not None:
            setattr(self.counts, example.fate, getattr(self.counts, example.fate) + 1)
        if not example.samples:
            reason = "no sample in it" if example.fate is None else "too long for a row"
            self.left_out.append(Fault(lane.source, lane.passes, ref, "", reason))

    def _skip(self, source: int, passes: int, ref: Ref, fault: tuple[str, str]) -> None:
        self.counts.skip(source, fault[1])
        self.faults.append(Fault(source, passes, ref, *fault))

    def _put(self, item: Item, target: Target | None) -> Row | None:
        capacity = self._rules.capacity(self._plan.first_step + self.step)
        if isinstance(self._buffer, BalancedBuffer):
            return self._buffer.put(item, capacity, target)
        return [item] if self._buffer is None else self._buffer.put(item, capacity)

    def _pop_row(self, target: Target | None) -> Row | None:
        capacity = self._rules.capacity(self._plan.first_step + self.step)
        if isinstance(self._buffer, BalancedBuffer):
            return self._buffer.pop_row(capacity, target)
        return None if self._buffer is None else self._buffer.pop_row(capacity)

    def _refill(self) -> None:
        """Hold back again what was held back when the state was saved."""
        items: list[Item] = []
        waited: list[int] = []
        skipped: set[str] = set()
        for place, key in enumerate(self._held):
            ref, piece, _, source, passes = item_place(key)
            name = example_name(source, passes, ref)
            example = self._found[name]
            if example.fault is not None:  # it was whole when the state was saved
                if name not in skipped:
                    self._skip(source, passes, ref, example.fault)
                skipped.add(name)
                continue
            if piece >= len(example.samples):
                where = self._plan.sources[source].place(ref)
                raise DataError(f"{where} is not what it was when the state was saved: it gives fewer samples")
            items.append(self._rules.item(example.samples, piece, source, passes, ref))
            waited.append(self._waited[place] if self._waited else 0)
        assert self._buffer is not None
        self._buffer.load_state_dict({"samples": items, "waited": waited})
        self._held, self._waited, self._found = [], [], {}


def fresh_state(shard: int, counts: Counts | None = None) -> ShardState:
    """The state of a shard at the beginning of an epoch."""
    return {"shard": shard, "counts": {} if counts is None else counts.state_dict()}
