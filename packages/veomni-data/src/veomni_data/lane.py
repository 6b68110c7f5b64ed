"""What a virtual shard reads of one source."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .encoding import Example, Request
from .multisource import Mixture, shard_part
from .rows import RowRules
from .source import Part, Ref, Source

_IDLE = 1000  # examples without a sample after which a source is not begun again


class Plan(NamedTuple):
    """What the shards of an epoch have in common."""

    sources: Sequence[Source]
    mixture: Mixture | None
    shards: int
    seed: int
    epoch: int
    first_step: int  # steps of the run before the epoch
    rules: RowRules


class Lane:
    """The examples of one source in the order in which a shard puts them; those asked for ahead wait here.

    Args:
        plan: of the epoch.
        number: of the shard.
        source: its number.
        state: `state_dict` of one, or {}.
    """

    def __init__(self, plan: Plan, number: int, source: int, state: Mapping[str, Any]) -> None:
        self.source = source
        self.passes: int = state.get("passes", 0)
        self.taken: int = state.get("taken", 0)  # examples of this pass that are put
        self.whole: bool = state.get("whole", False)  # whether a pass is complete
        self.empty: bool = state.get("empty", False)  # whether the source has nothing at all
        self.idle: int = state.get("idle", 0)  # examples since the last that gave a sample
        self.dry = False  # whether the part has no more
        self.head = 0  # serial of the example that is put next
        self.waiting: deque[Ref] = deque()  # asked for and not put, from the head on
        self.arrived: dict[int, Example] = {}  # by serial
        self.expected = 0  # foreseen draws of this source
        self._plan = plan
        self._number = number
        self.part = self._open(state.get("part"))

    def _open(self, state: dict[str, Any] | None = None, passes: int | None = None) -> Part:
        plan, source = self._plan, self._plan.sources[self.source]
        passes = self.passes if passes is None else passes
        return shard_part(source, self._number, plan.shards, passes, seed=plan.seed, epoch=plan.epoch, state=state)

    @property
    def amount(self) -> float:
        """Examples of the whole part, or where their number is not known, a weight: the source's bytes or 1."""
        rows = self._plan.sources[self.source].rows
        if rows is not None:
            return len(range(self._number, rows, self._plan.shards))
        return float(sum(getattr(self._plan.sources[self.source], "sizes", (1,))))

    def pull(self) -> Request | None:
        """The next example; None if the part has no more."""
        found = None if self.dry else self.part.next()
        if found is None:
            self.dry = True
            return None
        self.waiting.append(found[0])
        return Request(self.source, *found)

    def begin_again(self) -> Request | None:
        """Go over to the next pass that has something in it, and give its first example; None if none has.

        None too where nothing of a whole pass and of the last thousand examples (or, of a small source, of 20 times as
        many as it has) became a sample: else a source whose examples are all left out would be read for ever.
        """
        rows = self._plan.sources[self.source].rows
        if self.idle >= max(self.taken, _IDLE if rows is None else min(_IDLE, 20 * rows)):
            self.empty = True
            return None
        for _ in range(self._plan.shards):
            self.passes, self.taken, self.dry = self.passes + 1, 0, False
            self.part = self._open()
            if (request := self.pull()) is not None:
                return request
        self.empty = True
        return None

    def put(self) -> None:
        """The example at the head is done."""
        self.idle = 0 if self.arrived[self.head].samples else self.idle + 1
        self.waiting.popleft()
        del self.arrived[self.head]
        self.head += 1
        self.taken += 1

    def fetcher(self, passes: int) -> Part:
        """A part of which examples of a pass can be fetched."""
        return self.part if passes == self.passes else self._open(passes=passes)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, without what was asked for ahead."""
        state = {"passes": self.passes, "taken": self.taken, "whole": self.whole, "empty": self.empty}
        state["idle"] = self.idle
        part = self.part.state_dict(list(self.waiting))
        return {**{key: value for key, value in state.items() if value}, "part": part}
