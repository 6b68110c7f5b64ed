"""Proves from the ledger of a run that no sample was repeated and none left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ledger import Ledger, Line, read_ledger
from .multisource import shard_part
from .rows import item_place
from .source import Ref, SequenceSource, Source, sources_of

_SHOWN = 5  # counter-examples of a kind


@dataclass
class EpochReport:
    """What became of the examples of an epoch.

    Attributes:
        epoch: its number.
        first, last: its steps, counted over the run.
        ended: whether it is over.
        examples, samples: that were given; an example may be several samples.
        out: examples that were skipped or dropped, by reason.
        held: examples that are on their way, or were when the epoch ended (`drop_last`, or left early); None if it
            cannot be told.
        problems: what is wrong, as sentences; [] = nothing was repeated and nothing left out.
        unproven: what could not be looked into, as sentences.
    """

    epoch: int
    first: int
    last: int
    ended: bool = False
    examples: int = 0
    samples: int = 0
    out: Counter[str] = field(default_factory=Counter)
    held: int | None = 0
    problems: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)


@dataclass
class AuditReport:
    """The audit of a ledger.

    Attributes:
        epochs: in the order of the run.
    """

    epochs: list[EpochReport]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(epoch.problems for epoch in self.epochs)

    def __str__(self) -> str:
        lines = []
        for e in self.epochs:
            out = "".join(f", {number:,} out ({reason})" for reason, number in e.out.most_common())
            held = f", {e.held:,} {'not given' if e.ended else 'held back or on their way'}" if e.held else ""
            lines.append(
                f"epoch {e.epoch}{'' if e.ended else ' (not ended)'}, steps {e.first:,} to {e.last:,}: "
                f"{e.samples:,} samples of {e.examples:,} examples{out}{held}"
            )
            lines += [f"  WRONG: {problem}" for problem in e.problems]
            lines += [f"  not proven: {sentence}" for sentence in e.unproven]
        return "\n".join(lines)


def audit(folder: str | Path, dataset: Any = None) -> AuditReport:
    """What the ledger of a run proves.

    Within an epoch (and, where a source is read several times in one, within each of its passes) no sample may have
    been given twice. What was left out is found by the order of the epoch, which is worked out again: in each virtual
    shard a row starts with the oldest sample that is held back, so that everything before it must have been given,
    skipped or dropped; and once an epoch has ended without `drop_last`, everything must.

    Args:
        folder: of the ledger or of the run.
        dataset: what was loaded. Without it the order of a stream is not known, and nothing is said about what was left
            out of one; with it the stream is read through once.

    Raises:
        DataError: there is no ledger, or it is damaged.
    """
    ledger = read_ledger(folder)
    sources = None if dataset is None else sources_of(dataset)[0]
    epochs: dict[int, _Epoch] = {}  # by the steps of the run before it
    for attempt in ledger.attempts:
        for line in ledger.lines(attempt):
            before = line.run - line.step
            if before not in epochs:
                epochs[before] = _Epoch(ledger, line.epoch, before)
            epochs[before].add(line, attempt.settings)
    return AuditReport([epochs[before].report(sources) for before in sorted(epochs)])


class _Epoch:
    """What the ledger says of an epoch."""

    def __init__(self, ledger: Ledger, epoch: int, before: int) -> None:
        self._manifest = ledger.manifest
        self._epoch = epoch
        self._before = before
        self._ended = False
        self._settings: dict[str, Any] = {}
        self._given: dict[tuple[int, int, Any], dict[int, int]] = defaultdict(dict)  # example -> piece -> step
        self._pieces: dict[tuple[int, int, Any], int] = {}
        self._shards: dict[tuple[int, int, Any], int] = {}
        self._out: dict[tuple[int, int, Any], tuple[str, int]] = {}
        self._rows: dict[int, Counter[int]] = defaultdict(Counter)  # step -> shards
        self._leads: dict[int, list[tuple[int, int, int, Any]]] = defaultdict(list)  # shard -> (step, first example)
        self._repeats: list[str] = []

    def add(self, line: Line, settings: Any) -> None:
        self._ended |= line.end
        self._settings = settings
        for shard, reason, key in line.out:
            ref, _, _, source, passes = item_place(key)
            self._out[source, passes, _hashable(ref)] = (reason, shard)
        if line.end:
            return
        for shard, keys in line.rows:
            self._rows[line.run][shard] += 1
            for place, key in enumerate(keys):
                ref, piece, pieces, source, passes = item_place(key)
                example = (source, passes, _hashable(ref))
                if place == 0:
                    self._leads[shard].append((line.run, *example))
                earlier = self._given[example].setdefault(piece, line.run)
                if earlier != line.run or key in keys[:place]:
                    self._repeats.append(
                        f"{self._name(example)}{_piece(piece, pieces)} was given in step {earlier} and again in step "
                        f"{line.run}"
                    )
                self._pieces[example], self._shards[example] = pieces, shard

    def report(self, sources: Sequence[Source] | None) -> EpochReport:
        steps = sorted(self._rows)
        last = steps[-1] if steps else self._before
        report = EpochReport(self._epoch, self._before + 1, last, self._ended)
        report.examples = len(self._given)
        report.samples = sum(map(len, self._given.values()))
        report.out = Counter(reason for reason, _ in self._out.values())
        report.problems += _shortened(self._repeats)
        report.problems += self._missing_rows(last)
        lost: list[str] = []
        for number, described in enumerate(self._manifest["sources"]):
            orders = self._orders(number, described, None if sources is None else sources[number])
            if orders is None:
                report.held = None
                report.unproven.append(
                    f'whether examples of "{described["name"]}" were left out: it is a stream; give the data for that'
                )
            else:
                lost += self._left_out(number, orders, report)
        report.problems += _shortened(lost)
        return report

    def _missing_rows(self, last: int) -> list[str]:
        rows = self._manifest["global_batch_size"]
        absent = [step for step in range(self._before + 1, last + 1) if step not in self._rows]
        problems = [f"step {step} is not in the ledger" for step in absent]
        for step, shards in sorted(self._rows.items()):
            if (number := sum(shards.values())) != rows:
                problems.append(f"step {step} has {number} rows in the ledger, not {rows}")
        return _shortened(problems)

    def _orders(
        self, number: int, described: dict[str, Any], source: Source | None
    ) -> Iterator[tuple[int, int, list[Ref]]] | None:
        """For each shard and pass the refs in their order; None if it is not known."""
        shards, seed = self._manifest["global_batch_size"], self._manifest["seed"]
        passes = 1 + max((example[1] for example in self._given if example[0] == number), default=0)
        order_number = described.get("order_number")
        if order_number is not None:
            source = SequenceSource(range(described["rows"]), order_number=order_number)
        if source is None:
            return None

        def orders(source: Source) -> Iterator[tuple[int, int, list[Ref]]]:
            for again in range(passes):
                for shard in range(shards):
                    part = shard_part(source, shard, shards, again, seed=seed, epoch=self._epoch)
                    yield shard, again, [found[0] for found in iter(part.next, None)]

        return orders(source)

    def _left_out(self, number: int, orders: Iterator[tuple[int, int, list[Ref]]], report: EpochReport) -> list[str]:
        lost = []
        whole = self._ended and not self._settings["drop_last"]
        for shard, passes, refs in orders:
            places = {_hashable(ref): place for place, ref in enumerate(refs)}
            done = [self._is_done((number, passes, ref)) for ref in places]
            touched = [p for ref, p in places.items() if self._is_touched((number, passes, ref))]
            reached = max(touched, default=-1) + 1
            frontier, step = self._frontier(number, shard, passes, places)
            if whole:
                all_of_it = self._manifest["stopping"] is None
                frontier = max(frontier, len(refs) if all_of_it else reached)
                step = report.last
            for ref, place in places.items():
                if done[place]:
                    continue
                example = (number, passes, ref)
                if place < frontier:
                    given = self._given.get(example)
                    what = f"only pieces {sorted(given)} of {self._pieces[example]}" if given else "never"
                    lost.append(f"{self._name(example)} was given {what}, though it was due by step {step}")
                elif report.held is not None and (place < reached or self._ended):
                    report.held += 1
        return lost

    def _frontier(self, number: int, shard: int, passes: int, places: dict[Any, int]) -> tuple[int, int]:
        """Before which place of its order everything must have been given, and by which step."""
        frontier, step = 0, 0
        if self._settings["cost"]:  # then a row may start with another than the oldest sample
            return frontier, step
        if self._settings["buffer_size"] is None:
            for ref, place in places.items():
                given = self._given.get((number, passes, ref))
                if given is not None and place > frontier:
                    frontier, step = place, max(given.values())
            return frontier, step
        for run, source, again, ref in self._leads[shard]:
            if source == number and again > passes:
                return len(places), run
            if source == number and again == passes and places.get(ref, -1) > frontier:
                frontier, step = places[ref], run
        return frontier, step

    def _is_touched(self, example: tuple[int, int, Any]) -> bool:
        return example in self._out or example in self._given

    def _is_done(self, example: tuple[int, int, Any]) -> bool:
        given = self._given.get(example)
        return example in self._out or (given is not None and len(given) == self._pieces[example])

    def _name(self, example: tuple[int, int, Any]) -> str:
        source, passes, ref = example
        ref = list(ref) if isinstance(ref, tuple) else ref
        again = f" (pass {passes + 1})" if passes else ""
        return f'example {ref} of "{self._manifest["sources"][source]["name"]}"{again}'


def _piece(piece: int, pieces: int) -> str:
    return f", piece {piece + 1} of {pieces}," if pieces > 1 else ""


def _hashable(ref: Ref) -> Any:
    return tuple(_hashable(each) for each in ref) if isinstance(ref, list) else ref


def _shortened(problems: list[str]) -> list[str]:
    if len(problems) <= _SHOWN:
        return problems
    return [*problems[:_SHOWN], f"and {len(problems) - _SHOWN:,} more like the last"]
