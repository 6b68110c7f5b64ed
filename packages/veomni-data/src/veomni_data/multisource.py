"""Several sources mixed by weight: the YAML file that describes them, and the mixture."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .errors import DataError
from .files import find_files
from .source import Part, Source

Stopping = Literal["first_exhausted", "all_exhausted", "forever"]

_KEYS = ("sources", "names", "schedule", "stopping")
_SOURCE_KEYS = ("path", "columns")
_PHASE_KEYS = ("schedule_type", "weights", "steps")
_DRAWS = 256
_MIXING = 0x6D6978  # keeps these numbers apart from others that are drawn for the same seed, epoch and part


@dataclass(frozen=True)
class Phase:
    """A stretch of a schedule.

    Attributes:
        kind: "const", or "linear" = from the weights before to its own.
        weights: of each source; their sum is 1.
        steps: how long it takes; None = for ever.
    """

    kind: Literal["const", "linear"]
    weights: tuple[float, ...]
    steps: int | None = None


@dataclass(frozen=True)
class Mixture:
    """How often each of several sources is drawn.

    Attributes:
        names: of the sources.
        schedule: one after the other; the weights of the last stay.
        stopping: when an epoch of a part of the data ends. "first_exhausted": when a source that is drawn has no more;
            "all_exhausted": when each was read whole once, those that are used up earlier beginning anew, newly
            shuffled; "forever": never, all begin anew.
    """

    names: tuple[str, ...]
    schedule: tuple[Phase, ...]
    stopping: Stopping = "first_exhausted"

    def weights(self, step: int) -> tuple[float, ...]:
        """The share of each source at a step; their sum is 1.

        Args:
            step: rows (samples, in plain iteration) that each part of the data has given before.
        """
        before = self.schedule[0].weights
        for phase in self.schedule:
            if phase.steps is None or step < phase.steps:
                if phase.kind == "const" or phase.steps is None:
                    return phase.weights
                done = step / phase.steps
                return tuple(b + (w - b) * done for b, w in zip(before, phase.weights, strict=True))
            step -= phase.steps
            before = phase.weights
        return before

    def drawable(self, step: int) -> list[bool]:
        """Which sources have a weight at this step or a later one."""
        ever = [weight > 0 for weight in self.weights(step)]
        for phase in self.schedule:
            if phase.steps is None or step < phase.steps:
                ever = [e or weight > 0 for e, weight in zip(ever, phase.weights, strict=True)]
            step -= phase.steps or 0
        return [e or weight > 0 for e, weight in zip(ever, self.schedule[-1].weights, strict=True)]


def choose(weights: Sequence[float], number: float) -> int | None:
    """The source that a random number in [0, 1) means; None if no weight is positive."""
    total = sum(weights)
    chosen, reached = None, 0.0
    for source, weight in enumerate(weights):
        if weight > 0:
            chosen, reached = source, reached + weight
            if number * total < reached:
                break
    return chosen


class Draws:
    """Random numbers in [0, 1) by their place: `draws[n]` is a function of n, the seed, the epoch and the part."""

    def __init__(self, seed: int, epoch: int, part: int) -> None:
        self._key = (seed, epoch, part)
        self._block = -1
        self._numbers: npt.NDArray[np.float64] = np.zeros(0)

    def __getitem__(self, place: int) -> float:
        block, at = divmod(place, _DRAWS)
        if block != self._block:
            self._numbers = np.random.default_rng((*self._key, _MIXING, block)).random(_DRAWS)
            self._block = block
        return float(self._numbers[at])


def pass_epoch(epoch: int, passes: int) -> int:
    """The epoch that shuffles a source when it is read for the `passes`-th time (from 0) within an epoch."""
    return epoch + (passes << 32)


def shard_part(
    source: Source, shard: int, shards: int, passes: int, *, seed: int, epoch: int, state: dict[str, Any] | None = None
) -> Part:
    """What a virtual shard reads of a source in a pass, within an epoch.

    It is another part in each pass, so that all shards come to read a source with fewer examples than shards.
    """
    number = (shard + passes) % shards
    return source.part(number, shards, seed=seed, epoch=pass_epoch(epoch, passes), state=state)


class Interleaved(Iterator[Any]):
    """What one of the parts of several sources gives in an epoch, drawn by the weights of a mixture.

    Without a mixture the sources follow each other. After an error the iteration goes on with the next example.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Mixture | None,
        *,
        number: int = 0,
        parts: int = 1,
        seed: int,
        epoch: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._sources = sources
        self._mixture = mixture
        self._place = {"number": number, "parts": parts, "seed": seed}
        self._epoch = epoch
        self._numbers = Draws(seed, epoch, number)
        state = state or {"draws": 0, "rows": 0, "over": False, "sources": [None] * len(sources)}
        self._draws: int = state["draws"]
        self._rows: int = state["rows"]
        self._over: bool = state["over"]
        of_sources = [s or {"pass": 0, "rows": 0, "whole": False, "part": None} for s in state["sources"]]
        self._passes: list[int] = [s["pass"] for s in of_sources]
        self._given: list[int] = [s["rows"] for s in of_sources]
        self._whole: list[bool] = [s["whole"] for s in of_sources]
        self._parts: list[Part] = [self._part(i, s["part"]) for i, s in enumerate(of_sources)]

    def __next__(self) -> Any:
        while not self._over:
            source = self._choose()
            if source is None:
                break
            drawn = self._parts[source].next()
            if drawn is not None:
                self._rows += 1
                self._given[source] += 1
                return self._sources[source].encode(drawn[1])
            self._end_pass(source)
        self._over = True
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as a few plain values."""
        each = zip(self._passes, self._given, self._whole, self._parts, strict=True)
        return {
            "draws": self._draws,
            "rows": self._rows,
            "over": self._over,
            "sources": [{"pass": p, "rows": r, "whole": w, "part": part.state_dict([])} for p, r, w, part in each],
        }

    def _part(self, source: int, state: dict[str, Any] | None = None) -> Part:
        epoch = pass_epoch(self._epoch, self._passes[source])
        return self._sources[source].part(**self._place, epoch=epoch, state=state)

    def _choose(self) -> int | None:
        if self._mixture is None:
            return next((i for i, whole in enumerate(self._whole) if not whole), None)
        # a source that has nothing in this part cannot be drawn
        empty = [whole and not given for whole, given in zip(self._whole, self._given, strict=True)]
        weights = self._mixture.weights(self._rows)
        number = self._numbers[self._draws]
        self._draws += 1
        return choose([0.0 if e else w for w, e in zip(weights, empty, strict=True)], number)

    def _end_pass(self, source: int) -> None:
        self._whole[source] = True
        if self._mixture is None:
            return
        if self._mixture.stopping == "first_exhausted":
            self._over = True
        elif self._mixture.stopping == "all_exhausted":
            drawable = self._mixture.drawable(self._rows)
            self._over = all(whole or not d for whole, d in zip(self._whole, drawable, strict=True))
        if not self._over and self._given[source]:
            self._passes[source] += 1
            self._parts[source] = self._part(source)


@dataclass(frozen=True)
class SourceEntry:
    """A source of a multisource file.

    Attributes:
        name: that its rows carry.
        path: as for `build_dataset`.
        columns: what its columns are called, ours to theirs; see `rename_columns`.
    """

    name: str
    path: str
    columns: dict[str, str] | None = None


def read_multisource(path: Path, split: str = "train") -> tuple[list[SourceEntry], Mixture | None]:
    """The sources of a multisource file, and how they are mixed; None = one after the other.

    Args:
        path: a YAML file with `sources` (paths, or mappings of `path` and `columns`), and if wished `names`, `schedule`
            and `stopping`. Paths start from the file's folder, or where nothing lies there from where we are.

    Raises:
        DataError: what is wrong, with the file, line and key.
    """
    file = _YamlFile(path)
    top = file.mapping(file.root, "", _KEYS)
    if "sources" not in top:
        raise file.error(file.root, "sources", "a list of paths is missing")
    nodes = file.sequence(top["sources"], "sources")
    entries = [_entry(file, node, f"sources[{i}]") for i, node in enumerate(nodes)]
    for i, (source, _) in enumerate(entries):
        try:
            find_files(source, split)
        except DataError as error:
            raise file.error(nodes[i], f"sources[{i}]", str(error)) from error
    names = _names(file, top.get("names"), [source for source, _ in entries], top["sources"])
    sources = [SourceEntry(name, *entry) for name, entry in zip(names, entries, strict=True)]
    if "schedule" not in top:
        if "stopping" in top:
            raise file.error(top["stopping"], "stopping", "it has no meaning without a schedule of weights")
        return sources, None
    stopping: Any = (
        file.one_of(top["stopping"], "stopping", get_args(Stopping)) if "stopping" in top else "first_exhausted"
    )
    return sources, Mixture(tuple(names), _schedule(file, top["schedule"], len(names)), stopping)


def _entry(file: _YamlFile, node: Any, key: str) -> tuple[str, dict[str, str] | None]:
    if not file.is_mapping(node):
        return _from_folder(file.text(node, key), file.path.parent), None
    values = file.mapping(node, key, _SOURCE_KEYS)
    if "path" not in values:
        raise file.error(node, f"{key}.path", "it is missing")
    path = _from_folder(file.text(values["path"], f"{key}.path"), file.path.parent)
    if "columns" not in values:
        return path, None
    columns = file.mapping(values["columns"], f"{key}.columns")
    return path, {ours: file.text(theirs, f"{key}.columns.{ours}") for ours, theirs in columns.items()}


def _from_folder(path: str, folder: Path) -> str:
    """A path or a list of paths, from the folder where something lies there."""

    def one(part: str) -> str:
        there = folder / part
        found = "://" not in part and (there.exists() or (glob.has_magic(part) and any(glob.iglob(str(there)))))  # noqa: PTH207
        return str(there) if found else part

    whole = one(path)
    return whole if whole != path or "," not in path else ",".join(one(part.strip()) for part in path.split(","))


def _names(file: _YamlFile, node: Any, paths: Sequence[str], sources: Any) -> list[str]:
    if node is None:
        names, node, key = [Path(path.rstrip("/")).name.partition(".")[0] for path in paths], sources, "sources"
    else:
        names, key = [file.text(n, f"names[{i}]") for i, n in enumerate(file.sequence(node, "names"))], "names"
    if len(names) != len(paths):
        raise file.error(node, key, f"{len(names)} names are given for {len(paths)} sources")
    if twice := [name for name in names if names.count(name) > 1]:
        hint = "" if key == "names" else ", after their files: give them `names`"
        raise file.error(node, key, f'two sources are called "{twice[0]}"{hint}')
    return names


def _schedule(file: _YamlFile, node: Any, sources: int) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    nodes = file.sequence(node, "schedule")
    for i, each in enumerate(nodes):
        key = f"schedule[{i}]"
        values = file.mapping(each, key, _PHASE_KEYS)
        for needed in ("schedule_type", "weights"):
            if needed not in values:
                raise file.error(each, f"{key}.{needed}", "it is missing")
        kind = file.one_of(values["schedule_type"], f"{key}.schedule_type", ("const", "linear"))
        weights = [file.number(n, f"{key}.weights") for n in file.sequence(values["weights"], f"{key}.weights")]
        if len(weights) != sources:
            raise file.error(values["weights"], f"{key}.weights", f"{len(weights)} weights for {sources} sources")
        if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise file.error(values["weights"], f"{key}.weights", f"weights are 0 or more, and not all 0: {weights}")
        steps = None
        if "steps" in values:
            steps = file.number(values["steps"], f"{key}.steps")
            if not 1 <= steps < 1e15 or steps != int(steps):
                raise file.error(values["steps"], f"{key}.steps", f"a whole number of steps is expected, not {steps}")
        elif kind == "linear" or i + 1 < len(nodes):
            what = "a linear phase needs" if kind == "linear" else "a phase that others follow needs"
            raise file.error(each, f"{key}.steps", f"it is missing: {what} it")
        if kind == "linear" and i == 0:
            raise file.error(each, f"{key}.schedule_type", "a linear phase moves on from a phase before it")
        shares = tuple(weight / sum(weights) for weight in weights)
        phases.append(Phase(kind, shares, None if steps is None else int(steps)))
    return tuple(phases)


class _YamlFile:
    """A YAML file whose values know their lines."""

    def __init__(self, path: Path) -> None:
        import yaml

        self.path = path
        try:
            self.root: Any = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise DataError(f"{path}:{line}: this is not YAML ({error.problem or error.context})") from error
        except yaml.YAMLError as error:
            raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if self.root is None:
            raise DataError(f"{path} is empty: a multisource file has `sources`")

    def error(self, node: Any, key: str, message: str) -> DataError:
        """What is wrong with a value."""
        return DataError(f"{self.path}:{node.start_mark.line + 1}: {key + ': ' if key else ''}{message}")

    def is_mapping(self, node: Any) -> bool:
        """Whether a value is a mapping."""
        return bool(node.id == "mapping")

    def mapping(self, node: Any, key: str, allowed: Sequence[str] | None = None) -> dict[str, Any]:
        """The values of a mapping; an error names a key that is not allowed, with the nearest that is."""
        if not self.is_mapping(node):
            raise self.error(node, key, f"a mapping of {', '.join(allowed or ('names',))} is expected")
        values: dict[str, Any] = {}
        for name_node, value in node.value:
            name = str(name_node.value)
            if allowed is not None and name not in allowed:
                near = difflib.get_close_matches(name, allowed, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(allowed)}"
                raise self.error(name_node, f"{key}.{name}".lstrip("."), f"there is no such key; {hint}")
            if name in values:
                raise self.error(name_node, f"{key}.{name}".lstrip("."), "this key is given twice")
            values[name] = value
        return values

    def sequence(self, node: Any, key: str) -> list[Any]:
        """The values of a list, which has some."""
        if node.id != "sequence" or not node.value:
            raise self.error(node, key, "a list is expected, with at least one entry")
        return list(node.value)

    def text(self, node: Any, key: str) -> str:
        """A value that is text."""
        if node.id != "scalar" or node.tag.endswith(":null") or not node.value:
            raise self.error(node, key, "text is expected")
        return str(node.value)

    def number(self, node: Any, key: str) -> float:
        """A value that is a number."""
        try:
            if node.id == "scalar" and not node.tag.endswith((":bool", ":null")):
                return float(node.value.replace("_", ""))
        except ValueError:
            pass
        raise self.error(node, key, f"a number is expected, not {getattr(node, 'value', node.id)!r}")

    def one_of(self, node: Any, key: str, allowed: Sequence[str]) -> Any:
        """A value that is one of some words."""
        if node.id != "scalar" or node.value not in allowed:
            given = node.value if node.id == "scalar" else f"a {node.id}"
            near = difflib.get_close_matches(str(given), allowed, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(allowed)}"
            raise self.error(node, key, f'"{given}" is not known; {hint}')
        return node.value
