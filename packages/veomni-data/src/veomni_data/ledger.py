"""The ledger of a run: which sample went into which row of which step, in a few bytes a sample.

A ledger is a folder. `manifest.json` says what all its steps have in common. Each rank of each attempt (a process that
was started or resumed) appends to `ATTEMPT-RANK.jsonl.gz`: a first line about the attempt, then a line a step:

    {"run": 12, "epoch": 0, "step": 12, "rows": [[SHARD, [KEY, ...]], ...], "out": [[SHARD, REASON, KEY], ...]}

`run` and `step` count the steps of the run and of the epoch from 1, `rows` are in the order in which the rank got them,
and `out` are the examples that were skipped or dropped on the way. A KEY is [ref, piece, pieces - 1, source, passes]
without the zeros at its end, or the ref alone if that is a number. At an epoch's end stands a line with "end": true and
no rows.

A line is written when its step is over: when the next is asked for, when the loader's state is taken, or when the
iteration is left. So a kill loses the line of the step that was under way, which no checkpoint holds either, and the
ledger claims no step that was not given.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import DataError

MANIFEST = "manifest.json"
_GZIP = 31  # wbits: so that zcat reads the files
_VERSION = 1


@dataclass(frozen=True)
class Attempt:
    """One rank of an attempt.

    Attributes:
        number: attempts are counted from 0.
        rank, ranks: of the data-parallel ranks.
        first: the step of the run that it begins with.
        settings: those of the loader: micro_batch_size, max_seq_len, packing, buffer_size, too_long, cost, drop_last.
        file: its lines.
    """

    number: int
    rank: int
    ranks: int
    first: int
    settings: Mapping[str, Any]
    file: Path


@dataclass(frozen=True)
class Line:
    """What a rank gave in a step.

    Attributes:
        run, epoch, step: the step, counted from 1 over the run and over the epoch, and the epoch.
        rows: the shard of each row, and the keys of its samples.
        out: the shard, reason and key of examples that were skipped or dropped.
        end: whether the epoch ended after that step.
    """

    run: int
    epoch: int
    step: int
    rows: Sequence[tuple[int, Sequence[list[Any]]]]
    out: Sequence[tuple[int, str, list[Any]]]
    end: bool = False


@dataclass(frozen=True)
class Ledger:
    """What a folder holds.

    Attributes:
        folder: where.
        manifest: `sources` (name, rows, order_number), `global_batch_size`, `seed`, `stopping`, `description`.
        attempts: all ranks of all attempts, in order.
    """

    folder: Path
    manifest: Mapping[str, Any]
    attempts: Sequence[Attempt]

    def lines(self, attempt: Attempt) -> Iterator[Line]:
        """The lines of a rank that count: without steps that a later attempt began again."""
        later = [other.first for other in self.attempts if other.number > attempt.number]
        undone = min(later, default=None)
        for line in islice(_read_lines(attempt.file), 1, None):  # the first is about the attempt
            parsed = Line(
                line["run"],
                line["epoch"],
                line["step"],
                [(shard, [_as_key(key) for key in keys]) for shard, keys in line.get("rows", ())],
                [(shard, reason, _as_key(key)) for shard, reason, key in line.get("out", ())],
                line.get("end", False),
            )
            if undone is None or parsed.run < undone:
                yield parsed

    def find(self, step: int, rank: int) -> tuple[Attempt, Line]:
        """What a rank was given in a step of the run.

        Raises:
            DataError: the ledger has no such step, or there was no such rank.
        """
        steps: list[int] = []
        for attempt in reversed(self.attempts):
            if attempt.rank != rank:
                continue
            for line in self.lines(attempt):
                if not line.end:
                    steps.append(line.run)
                    if line.run == step:
                        return attempt, line
        if not steps:
            raise DataError(f"{self.folder} has no steps of rank {rank}: its ranks are 0 to {self.ranks - 1}")
        raise DataError(f"{self.folder} has no step {step} of rank {rank}: it has {min(steps)} to {max(steps)}")

    @property
    def ranks(self) -> int:
        """The most ranks of an attempt."""
        return max((attempt.ranks for attempt in self.attempts), default=0)


def read_ledger(folder: str | Path) -> Ledger:
    """The ledger of a run: of its folder, or of the run's, which has it as `ledger/`.

    Raises:
        DataError: there is none, or a file of it is damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() and (folder / "ledger" / MANIFEST).is_file():
        folder = folder / "ledger"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no ledger: there is no {MANIFEST}") from None
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("ledger") != _VERSION:
        raise DataError(f"{folder / MANIFEST} is not the manifest of a ledger of version {_VERSION}")
    return Ledger(folder, manifest, _attempts(folder))


def _attempts(folder: Path) -> list[Attempt]:
    found = []
    for file in folder.glob("*-*.jsonl.gz"):
        head = next(_read_lines(file), None)
        if head is not None:  # else it was killed before its first line was whole
            rank, ranks, first = head["rank"], head["ranks"], head["first"]
            found.append(Attempt(head["attempt"], rank, ranks, first, head["settings"], file))
    return sorted(found, key=lambda attempt: (attempt.number, attempt.rank))


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file, whose end may be missing."""
    unpack, rest = zlib.decompressobj(_GZIP), b""
    with file.open("rb") as packed:
        try:
            while block := packed.read(1 << 20):
                *lines, rest = (rest + unpack.decompress(block)).split(b"\n")
                yield from map(json.loads, lines)
        except (zlib.error, ValueError) as error:
            raise DataError(f"{file} is damaged: {error}") from error


def _as_key(key: Any) -> list[Any]:
    return key if isinstance(key, list) else [key]


class LedgerWriter:
    """Appends the steps of a rank to a ledger.

    Args:
        folder: of the ledger.
        manifest: what all attempts have in common; written once, and compared after that.
        settings: of the loader.
        rank, ranks: among the data-parallel ranks.
    """

    def __init__(
        self, folder: Path, *, manifest: Mapping[str, Any], settings: Mapping[str, Any], rank: int, ranks: int
    ) -> None:
        self.folder = folder
        self._manifest = {"ledger": _VERSION, **manifest}
        self._settings = dict(settings)
        self._rank = rank
        self._ranks = ranks
        self._attempt: int | None = None
        self._packer: Any = None
        self._file: Any = None  # unbuffered
        self._pending: list[dict[str, Any]] = []

    @property
    def begun(self) -> bool:
        """Whether the attempt has its number."""
        return self._attempt is not None

    def prepare(self, first: int) -> int:
        """Write or check the manifest; returns the number of an attempt that begins with this step of the run.

        Raises:
            DataError: the ledger is one of other data.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / MANIFEST
        if not path.exists():
            own = path.with_name(f".{MANIFEST}.{os.getpid()}.{self._rank}")
            own.write_text(json.dumps(self._manifest, indent=1) + "\n", encoding="utf-8")
            try:
                os.link(own, path)  # whole or not at all, and never over another
            except FileExistsError:
                pass
            finally:
                own.unlink()
        ledger = read_ledger(self.folder)
        for key in ("global_batch_size", "seed", "sources"):
            if ledger.manifest[key] != self._manifest[key]:
                raise DataError(
                    f"{self.folder} is the ledger of a run with {key}={ledger.manifest[key]}, not "
                    f"{key}={self._manifest[key]}: give another folder"
                )
        if not ledger.attempts:
            return 0
        number = ledger.attempts[-1].number
        latest = [attempt for attempt in ledger.attempts if attempt.number == number]
        # without a process group the ranks find each other by this
        joins = all((a.first, a.ranks) == (first, self._ranks) and a.rank != self._rank for a in latest)
        return number if joins and self._ranks > 1 else number + 1

    def begin(self, attempt: int, first: int) -> None:
        """What follows is an attempt from this step of the run on."""
        self.close()
        self._attempt = attempt
        head = {"attempt": attempt, "rank": self._rank, "ranks": self._ranks, "first": first}
        self._pending = [{**head, "settings": self._settings}]

    def hold(self, line: dict[str, Any]) -> None:
        """Note a line that is to be written once its step is over."""
        self._pending.append(line)

    def commit(self) -> None:
        """Write what is noted, if there is a step in it."""
        if not self._pending or (self._file is None and len(self._pending) < 2):
            return
        if self._file is None:
            self._file = (self.folder / f"{self._attempt:04d}-{self._rank:05d}.jsonl.gz").open("wb", buffering=0)
            self._packer = zlib.compressobj(9, zlib.DEFLATED, _GZIP)
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in self._pending)
        self._file.write(self._packer.compress(text.encode()) + self._packer.flush(zlib.Z_SYNC_FLUSH))
        self._pending = []

    def close(self) -> None:
        """Write what is noted and end the file."""
        self.commit()
        if self._file is not None:
            self._file.write(self._packer.flush(zlib.Z_FINISH))
            self._file.close()
        self._file, self._packer, self._attempt, self._pending = None, None, None, []


def packed_key(key: list[Any]) -> Any:
    """A key as it is written."""
    return key[0] if len(key) == 1 and isinstance(key[0], int) else key
