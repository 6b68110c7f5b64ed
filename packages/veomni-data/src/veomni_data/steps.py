"""The steps of an epoch on one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import Votes, exchange_rows, fill_up, first_value, gather_outlooks, gather_values, sum_votes
from .balance import Outlook, Target, step_target
from .collators import Batch, Sample
from .counts import Counts, total_counts
from .encoding import Encoder
from .errors import DataError
from .feeding import Feeder
from .lane import Plan
from .ledger import LedgerWriter, packed_key
from .rows import Item, Row, example_key
from .shards import Paused, ShardState, VirtualShard, fresh_state
from .skips import skips_sentence, too_many, write_skips

_PLACE = ("epoch", "step", "steps_before")  # in a state
_NAMED = 3  # samples of a micro-batch that cannot be made
_PAUSE = 100  # broken examples after which a rank asks the others whether to go on, before it has made its rows

Collate = Callable[[list[Sample]], Batch]
Tail = tuple[list[int], list[tuple[int, Row | None]]]  # the shards of all rows of a step; this rank's rows with theirs


class DataLoader:
    """Iterates the steps of an epoch: each is the list of this rank's micro-batches. Made by `build_dataloader`.

    Each iteration is the next epoch; `set_epoch` chooses another. `len()` is the number of steps of the epoch where it
    can be counted (the dataset is a list of samples), else a TypeError.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        plan: Plan,
        encoder: Encoder,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        workers: dict[str, Any],
        collate: Collate,
        drop_last: bool,
        group: Any,
        max_skipped: float,
        skipped_path: Path | None,
        ledger: Path | None,
        description: Mapping[str, Any] | None,
        pin_memory: bool,
    ) -> None:
        self.dataset = dataset
        self.global_batch_size = plan.shards
        self._plan = plan
        self._encoder = encoder
        self._numbers = range(dp_rank * plan.shards // dp_size, (dp_rank + 1) * plan.shards // dp_size)
        self._alone = dp_size == 1
        self._micro_batch_size = micro_batch_size
        self._collate = collate
        self._drop_last = drop_last
        self._group = group
        self._max_skipped = max_skipped
        self._skipped_path = skipped_path
        self._pin = pin_memory and torch.accelerator.is_available()
        self._rows = None if any(s.rows is None for s in plan.sources) else sum(s.rows or 0 for s in plan.sources)
        self._feeder = Feeder(encoder, seed=plan.seed, **workers)
        self._epoch = 0  # of the iteration that is under way, or of the next
        self._step = 0  # steps of it that are made
        self._before = 0  # steps of the run before it
        self._start: list[ShardState] | None = None  # of all shards, where that iteration begins; None: at the first
        self._start_step = 0
        self._steps: int | None = None  # of the epoch, once counted
        self._tail: dict[int, Tail] = {}  # steps in which a shard has no row left, once counted
        self._shards: list[VirtualShard] | None = None  # of the iteration that is under way
        self._counts = {number: Counts() for number in self._numbers}  # while none is
        self._failed = False  # in the midst of a step
        self._out: list[list[Any]] = []  # what was skipped or dropped since the last line of the ledger
        self._last_fault: str | None = None
        self._given: list[list[Item]] = []  # the samples of each micro-batch of the last step
        self._ledger: LedgerWriter | None = None
        if ledger is not None:
            self._ledger = LedgerWriter(
                ledger,
                manifest=self._manifest(description),
                settings={
                    "micro_batch_size": micro_batch_size,
                    "max_seq_len": plan.rules.max_seq_len,
                    "packing": plan.rules.buffer_size is not None,
                    "buffer_size": plan.rules.buffer_size,
                    "too_long": encoder.too_long,
                    "cost": plan.rules.cost is not None,
                    "drop_last": drop_last,
                },
                rank=dp_rank,
                ranks=dp_size,
            )

    def __iter__(self) -> Iterator[list[Batch]]:
        if self._shards is not None:  # an iteration was left before its end
            self.set_epoch(self._epoch + 1)
        shards = self._shards = self._begin()
        self._feeder.begin(shards)
        while True:
            if self._shards is not shards:
                raise RuntimeError("this iteration is over: the loader was iterated or set anew since it began")
            self._failed = True
            rows = self._next_rows(shards)
            if rows is None:
                break
            self._step += 1
            for shard in shards:
                shard.step = self._step
            batches = self._batches(rows)
            micro_batches = (rows[start : start + self._micro_batch_size] for start in self._starts())
            self._given = [[item for _, row in each for item in row or ()] for each in micro_batches]
            self._note([[shard, [packed_key(item.key) for item in row or ()]] for shard, row in rows])
            self._feeder.end_step(sum(len(row or ()) for _, row in rows))
            self._failed = False
            try:
                yield batches
            finally:  # also if the iteration is left here
                if self._shards is shards and self._ledger is not None:
                    self._ledger.commit()
        if self._step == 0:
            raise DataError(self._nothing(shards))
        self._note(None)
        self._failed = False
        self.set_epoch(self._epoch + 1)

    def __len__(self) -> int:
        if not is_list_of_samples(self.dataset):
            raise TypeError("the number of steps is not known before the samples are encoded")
        if self._steps is None:
            self._steps = self._count_steps()
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch, from its beginning, unless a loaded state goes on within it."""
        if self._shards is None and epoch == self._epoch:
            return
        self._counts = self._own_counts()
        self._before += self._step
        self._epoch, self._step, self._start_step = epoch, 0, 0
        self._start = self._steps = self._shards = None
        self._failed, self._out = False, []

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands after the last step that it was given: a few plain values, JSON-able.

        Raises:
            DataError: the loader has failed in the midst of a step.
        """
        if self._failed:
            raise DataError("the loader has failed in the midst of a step: go on from the state after an earlier one")
        if self._ledger is not None:
            self._ledger.commit()
        if self._shards is not None:
            shards = [shard.state_dict() for shard in self._shards]
        elif self._start is not None:
            shards = [self._start[number] for number in self._numbers]
        else:
            shards = [fresh_state(number, self._counts[number]) for number in self._numbers]
        where = dict(zip(_PLACE, (self._epoch, self._step, self._before), strict=True))
        return where | self._identity() | {"shards": shards}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where the ranks stood that saved these states, however many they were.

        Args:
            states: the `state_dict()` of each of them, in any order.

        Raises:
            DataError: a state is missing or twice there, they are not of one step, or they were saved for another
                `global_batch_size`, `seed`, number of samples, other sources, or with packing and without.
        """
        if isinstance(states, Mapping) or not states:
            raise DataError("load_state_dict needs the list of the states of all ranks that saved")
        for state in states:
            if not isinstance(state, Mapping) or not {*_PLACE, "shards", *self._identity()} <= state.keys():
                raise DataError(
                    f"each state must be what state_dict() of a loader gave, not a {type(state).__name__}"
                    + (f" with the keys {sorted(map(str, state))}" if isinstance(state, Mapping) else "")
                )
            for key, value in self._identity().items():
                if state[key] != value:
                    raise DataError(f"the loader was saved with {key}={state[key]} but is loaded with {key}={value}")
            for key in ("epoch", "step"):
                if state[key] != states[0][key]:
                    raise DataError(f"the states are not of one step: {key} is {states[0][key]} and {state[key]}")
        shards = sorted((shard for state in states for shard in state["shards"]), key=lambda shard: shard["shard"])
        if [shard["shard"] for shard in shards] != list(range(self.global_batch_size)):
            raise DataError(
                f"the {len(states)} states hold {len(shards)} rows' parts of the epoch, not each of the "
                f"{self.global_batch_size} once: give the states of all ranks that saved"
            )
        if self._ledger is not None:
            self._ledger.close()
        self._epoch, self._before = states[0]["epoch"], states[0]["steps_before"]
        self._step = self._start_step = states[0]["step"]
        self._start, self._steps, self._shards = shards, None, None
        self._failed, self._out = False, []

    def given_sources(self) -> list[list[tuple[str, int]]]:
        """The name of the source and the tokens of each sample of each micro-batch of the last step, in their order."""
        return [[(self._plan.sources[item.source].name, item.tokens) for item in each] for each in self._given]

    def given_places(self) -> list[list[str]]:
        """The file and line (or the number) of each sample of each micro-batch of the last step, in their order."""
        return [[self._plan.sources[item.source].place(item.ref) for item in each] for each in self._given]

    def write_ledger(self) -> None:
        """Write what the ledger has noted of the last step now, for a process that is about to end in its midst."""
        if self._ledger is not None:
            self._ledger.commit()

    def counts(self) -> dict[str, Any]:
        """What became of the examples of this rank's parts of the data since the run began, resumed runs included.

        Returns:
            `seen` (examples), `samples` and `tokens` of each source in the rows that were given, `skipped` examples of
            each source by reason, and `dropped`, `truncated` and `split` ones that were too long. The sum over the
            ranks is that of the run.
        """
        return total_counts(self._own_counts().values(), [source.name for source in self._plan.sources])

    def _identity(self) -> dict[str, Any]:
        """What a state must have in common with the loader that goes on from it."""
        return {
            "seed": self._plan.seed,
            "global_batch_size": self.global_batch_size,
            "samples": self._rows,
            "sources": [source.name for source in self._plan.sources],
            "packing": self._plan.rules.buffer_size is not None,
        }

    def _manifest(self, description: Mapping[str, Any] | None) -> dict[str, Any]:
        plan = self._plan
        sources = [
            {"name": s.name, "rows": s.rows, "order_number": getattr(s, "order_number", None)} for s in plan.sources
        ]
        return {
            "global_batch_size": plan.shards,
            "seed": plan.seed,
            "sources": sources,
            "stopping": None if plan.mixture is None else plan.mixture.stopping,
            "description": None if description is None else dict(description),
        }

    def _own_counts(self) -> dict[int, Counts]:
        if self._shards is not None:
            return {shard.number: shard.counts for shard in self._shards}
        if self._start is not None:
            return {number: Counts.from_state(self._start[number]["counts"]) for number in self._numbers}
        return self._counts

    def _begin(self) -> list[VirtualShard]:
        if self._group is None and not self._alone:
            len(self)  # counted from where the iteration begins
        if self._ledger is not None and not self._ledger.begun:
            self._begin_ledger(self._ledger)
        return self._open_shards(self._numbers)

    def _open_shards(self, numbers: Iterable[int]) -> list[VirtualShard]:
        plan = self._plan._replace(epoch=self._epoch, first_step=self._before)
        if self._start is not None:
            return [VirtualShard(plan, self._start[number], self._start_step) for number in numbers]
        return [VirtualShard(plan, fresh_state(number, self._counts.get(number))) for number in numbers]

    def _begin_ledger(self, ledger: LedgerWriter) -> None:
        first = self._before + self._step + 1
        answer: Any = None
        if self._group is None or dist.get_rank(self._group) == 0:
            try:
                answer = ledger.prepare(first)
            except (DataError, OSError) as error:
                answer = str(error)
        answer = first_value(answer, self._group)
        if isinstance(answer, str):
            raise DataError(answer)
        ledger.begin(answer, first)

    def _next_rows(self, shards: list[VirtualShard]) -> list[tuple[int, Row | None]] | None:
        """The rows of this rank for the next step, with the shards they are of; None if there is no next step."""
        error = self._refill(shards)
        target = None if self._plan.rules.cost is None else self._target(shards, error)
        rows, votes = self._make_rows(shards, target, error)
        if self._group is None and not self._alone:
            return self._foreseen_rows(shards, rows, target)
        have = dict(zip(self._numbers, rows, strict=True))
        givers: list[int | None] = list(range(self.global_batch_size))
        if tail := 0 < votes.rows < self.global_batch_size:
            givers = fill_up(have, shards, self._step, lambda asked: self._make_rows(asked, target)[0], self._group)
        if (None in givers and self._drop_last) or not votes.rows:
            return None
        given = {place: row for place, row in have.items() if row is not None}
        self._count_given((givers[place], row) for place, row in given.items())
        by_cost = self._plan.rules.cost is not None
        if self._group is not None and not self._alone and (by_cost or tail):
            dealt = exchange_rows(given, self.global_batch_size, self._group, by_cost)
        else:
            dealt = list(have.items())
        return [(place if (giver := givers[place]) is None else giver, row) for place, row in dealt]

    def _make_rows(
        self, shards: Sequence[VirtualShard], target: Target | None, error: Exception | None = None
    ) -> tuple[list[Row | None], Votes]:
        """A row of each of these shards, and how all ranks stand after it; `error` has been met before."""
        every = self._shards or []
        rows: list[Row | None] = []
        while True:
            paused = False
            try:
                while error is None and len(rows) < len(shards):
                    shard = shards[len(rows)]
                    row = shard.next_row(partial(self._feeder.wait, shard), target, partial(self._pauses, every))
                    if isinstance(row, Paused):
                        paused = True
                        break
                    rows.append(row)
                self._take_faults(every)
            except Exception as raised:
                error = raised
            votes = self._vote(every, rows, error, paused)
            if not votes.paused:
                return rows, votes

    def _foreseen_rows(
        self, shards: list[VirtualShard], rows: list[Row | None], target: Target | None
    ) -> list[tuple[int, Row | None]] | None:
        """`_next_rows` of ranks that have no group, but have counted the steps beforehand."""
        if self._step >= len(self):
            return None
        made = list(zip(self._numbers, rows, strict=True))
        givers, own = self._tail.get(self._step, (list(self._numbers), made))
        for shard, row in zip(shards, rows, strict=True):
            for _ in range(givers.count(shard.number) - (row is not None)):
                made.append((shard.number, self._make_rows([shard], target)[0][0]))
        self._count_given(made)
        return own

    def _count_given(self, rows: Iterable[tuple[int | None, Row | None]]) -> None:
        own = {shard.number: shard for shard in self._shards or ()}
        for number, row in rows:
            for item in row or ():
                assert number is not None
                own[number].counts.give(item.source, item.tokens)

    def _refill(self, shards: list[VirtualShard]) -> Exception | None:
        """Encode again what the shards held back when their state was saved; what went wrong with it."""
        try:
            for shard in shards:
                while shard.to_refill:
                    self._feeder.wait(shard)
        except Exception as error:
            return error
        return None

    def _target(self, shards: list[VirtualShard], error: Exception | None) -> Target:
        outlooks = [Outlook(0.0, 0.0) if error else shard.outlook() for shard in shards]
        return step_target(gather_outlooks(outlooks, self._group))

    def _pauses(self, shards: list[VirtualShard]) -> bool:
        return sum(len(shard.faults) for shard in shards) >= (_PAUSE if self._max_skipped else 1)

    def _take_faults(self, shards: list[VirtualShard]) -> None:
        """Write down what was skipped and dropped since the last time."""
        faults = [fault for shard in shards for fault in shard.faults]
        for shard in shards:
            for fault in (*shard.faults, *shard.left_out):
                self._out.append([shard.number, fault.reason, example_key(fault.source, fault.passes, fault.ref)])
            shard.faults, shard.left_out = [], []
        if faults:
            self._last_fault = faults[-1].message
        if self._skipped_path is not None:
            path, sources = self._skipped_path, self._plan.sources
            write_skips(path, faults, sources, epoch=self._epoch, step=self._before + self._step + 1)

    def _vote(self, shards: list[VirtualShard], rows: list[Row | None], error: Exception | None, paused: bool) -> Votes:
        """How all ranks stand; raises on all of them if one cannot go on or too much is broken."""
        skipped, seen = sum(shard.counts.skips for shard in shards), sum(shard.counts.seen for shard in shards)
        there = sum(row is not None for row in rows)
        votes = sum_votes(Votes(there, error is not None, paused, skipped, seen), self._group)
        self._raise_together(error, votes)
        judged = self._group is not None or self._alone
        if judged and too_many(votes.skipped, votes.seen, self._max_skipped, self._rows):
            raise DataError(self._too_many(shards, votes.seen))
        return votes

    def _raise_together(self, error: Exception | None, votes: Votes) -> None:
        """Raise on all ranks what one of them has met."""
        if votes.errors:
            text = None if error is None else str(error) or type(error).__name__
            if error is not None and not isinstance(error, DataError):
                text = " ".join([f"{type(error).__name__}: {error}", *_first_note(error)])
            texts = gather_values(text, self._group)
            if error is not None and not isinstance(error, DataError):
                raise error
            # not the exception itself: with its traceback it would keep this frame and the workers
            raise DataError(next(t for t in texts if t is not None))

    def _too_many(self, shards: list[VirtualShard], seen: int) -> str:
        own: Counter[str] = Counter()
        for shard in shards:
            for reasons in shard.counts.skipped.values():
                own.update(reasons)
        every = gather_values((dict(own), self._last_fault), self._group)
        last = next((fault for _, fault in every if fault is not None), None)
        if self._max_skipped == 0 and last is not None:
            return str(last)
        reasons = sum((Counter(counted) for counted, _ in every), Counter())
        return skips_sentence(reasons, seen, self._max_skipped, last, self._skipped_path)

    def _nothing(self, shards: list[VirtualShard]) -> str:
        """Why an epoch is without a step."""
        own = total_counts([shard.counts for shard in shards], [source.name for source in self._plan.sources])
        every = gather_values(own, self._group)
        seen, dropped = (sum(counts[key] for counts in every) for key in ("seen", "dropped"))
        skipped = sum(sum(reasons.values()) for counts in every for reasons in counts["skipped"].values())
        rows = f"a step of global_batch_size={self.global_batch_size} rows" if self._drop_last else "a step"
        limit = self._plan.rules.max_seq_len
        return (
            f"epoch {self._epoch} has too little for {rows}: since the run began {seen:,} examples were seen, of which "
            f"{skipped:,} are broken and {dropped:,} were dropped as longer than max_seq_len={limit}"
        )

    def _starts(self) -> range:
        return range(0, len(self._numbers), self._micro_batch_size)

    def _batches(self, rows: list[tuple[int, Row | None]]) -> list[Batch]:
        """The micro-batches of a step; if those of one rank cannot be made, all raise, so that none waits for it."""
        batches: list[Batch] = []
        error: Exception | None = None
        try:
            for start in self._starts():
                batches.append(self._batch(rows[start : start + self._micro_batch_size]))
        except Exception as raised:
            error = raised
        self._raise_together(error, sum_votes(Votes(0, error is not None, 0, 0, 0), self._group))
        return batches

    def _batch(self, rows: Sequence[tuple[int, Row | None]]) -> Batch:
        items = [item for _, row in rows for item in row or ()]
        try:
            batch = self._collate([item.sample for item in items])
        except DataError as error:
            places = [self._plan.sources[item.source].place(item.ref) for item in items]
            named = ", ".join(places[:_NAMED]) + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
            raise DataError(f"{error} (micro-batch of {named})", reason=error.reason) from error
        if not self._pin:
            return batch
        return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _note(self, rows: list[Any] | None) -> None:
        """Note the step that is made in the ledger, or that the epoch has ended after it."""
        out, self._out = self._out, []
        if self._ledger is None:
            return
        line: dict[str, Any] = {"run": self._before + self._step, "epoch": self._epoch, "step": self._step}
        if out:
            line["out"] = [[shard, reason, packed_key(key)] for shard, reason, key in out]
        self._ledger.hold(line | ({"end": True} if rows is None else {"rows": rows}))
        if rows is None:
            self._ledger.commit()

    def _count_steps(self) -> int:
        """Steps of the epoch from where it begins on, by making all rows of all ranks without their batches."""
        shards = self._open_shards(range(self.global_batch_size))
        feeder = Feeder(self._encoder, num_workers=0, prefetch_factor=0, worker_init=None, timeout=None, seed=0)
        feeder.begin(shards)
        for shard in shards:
            while shard.to_refill:
                feeder.wait(shard)
        self._tail = {}
        step = self._start_step
        while True:
            target = None
            if self._plan.rules.cost is not None:
                target = step_target([shard.outlook() for shard in shards])

            def make(asked: list[VirtualShard], target: Target | None = target) -> list[Any]:
                return [shard.next_row(partial(feeder.wait, shard), target) for shard in asked]

            have = dict(enumerate(make(shards)))
            if any(row is None for row in have.values()):
                givers = fill_up(have, shards, step, make, None)
                if (None in givers) if self._drop_last else not any(have.values()):
                    break
                given = [(place if giver is None else giver, have[place]) for place, giver in enumerate(givers)]
                self._tail[step] = [g for g in givers if g is not None], [given[place] for place in self._numbers]
            step += 1
            for shard in shards:
                shard.step = step
        if self._group is None and not self._alone:
            skipped, seen = sum(shard.counts.skips for shard in shards), sum(shard.counts.seen for shard in shards)
            if too_many(skipped, seen, self._max_skipped, self._rows):
                self._last_fault = next(fault.message for shard in shards for fault in shard.faults)
                raise DataError(self._too_many(shards, seen))
        return step


def is_list_of_samples(dataset: Any) -> bool:
    """Whether lengths are known without encoding: there is no transform behind a list."""
    return (
        isinstance(dataset, (list, tuple))
        and len(dataset) > 0
        and isinstance(dataset[0], Mapping)
        and "input_ids" in dataset[0]
    )


def _first_note(error: BaseException) -> list[str]:
    return [f"({note.splitlines()[0]})" for note in getattr(error, "__notes__", ())[:1]]
