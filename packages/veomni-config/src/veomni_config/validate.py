"""What else can be known before a device is taken: whether files are there, and whether ranks can share the rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import BaseModel

from .batch_plan import PLAN_KEYS
from .errors import ConfigError, Problem
from .recipe import RecipeConfig
from .schema import config_keys, nearest
from .section import touches
from .yaml_reader import read_file

_DATA = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".tar", ".gz", ".zst")
_PATHS = ("config_path", "model_path", "tokenizer_path", "train_path", "eval_path", "load_checkpoint_path")
_KERNELS = (
    "auto",
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "segments",
    "native-sparse",
)
_SCHEDULES = ("const", "linear")
_STOPPING = ("first_exhausted", "all_exhausted", "forever")


def further_problems(
    config: BaseModel, bad: Collection[str], in_broken_rules: Collection[str], world_size: int | None
) -> Iterator[Problem]:
    """What stops a run although its configuration is valid; nothing is said about the keys in `bad`.

    The batches are planned for `world_size`, where it is given and the keys of the plan are right and break no rule.
    """
    told: set[str] = set()
    for key in config_keys(type(config)):
        value: Any = config
        for name in key.path:
            value = getattr(value, name, None)
        if not any(touches(key.dotted, each) for each in bad):
            for problem in _of_key(key.dotted, value):
                if problem.text not in told:  # `config_path` falls back to `model_path`
                    told.add(problem.text)
                    yield problem
    wrong = any(touches(key, each) for key in PLAN_KEYS for each in (*bad, *in_broken_rules))
    if world_size is not None and isinstance(config, RecipeConfig) and not wrong:
        try:
            config.batch_plan(world_size)
        except ConfigError as error:
            yield from error.problems


def _of_key(key: str, value: Any) -> Iterator[Problem]:
    if isinstance(value, Mapping):  # `model.encoders.image.model_path`
        for name, inner in value.items():
            yield from _of_key(f"{key}.{name}", inner)
    if not isinstance(value, str):
        return
    name = key.rpartition(".")[2]
    if name in _PATHS and not (name == "load_checkpoint_path" and value == "auto"):
        paths = value.split(",") if name in ("train_path", "eval_path") and not _exists(value) else [value]
        for path in (each.strip() for each in paths):
            if (_looks_local(path) or name == "load_checkpoint_path") and not _exists(path):
                yield Problem(key, f"{path}: no such file or folder")
            elif name == "train_path" and path.endswith((".yaml", ".yml")) and _exists(path):
                yield from _of_sources(key, path)
    if key == "model.attn_implementation" and value not in _KERNELS:
        near = nearest(value, _KERNELS, 0.8)
        if near:
            yield Problem(key, f"{value!r} given: no kernel of that name is known, did you mean {near}?")


def _looks_local(path: str) -> bool:
    """Whether `path` cannot be a hub id; a glob is left to the loader."""
    is_glob = any(character in path for character in "*?[")
    return not is_glob and (path.startswith(("/", "./", "../", "~")) or path.endswith((*_DATA, ".yaml", ".yml")))


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a user whom nobody knows
        return False


def _of_sources(key: str, file: str) -> Iterator[Problem]:
    """What is wrong with a multisource file: `sources`, their `names`, and the `schedule` of their weights."""
    try:
        tree = read_file(Path(file).expanduser())
    except ConfigError as error:
        yield Problem(key, f"{file}: cannot be read: {error}")
        return
    for place, node in tree.problems():
        yield Problem(key, f"{file}: {'.'.join(map(str, place))}: {node.problem}")
    content = tree.plain()
    sources, names, schedule = (content.get(name) for name in ("sources", "names", "schedule"))
    if not isinstance(sources, list) or not sources or not all(_path_of(each) for each in sources):
        yield Problem(key, f"{file}: sources: a list of paths, or of mappings with a path, is expected")
        return
    count = len(sources)
    for source in map(_path_of, sources):
        assert source is not None
        if _looks_local(source) and not _exists(source) and not _exists(str(Path(file).parent / source)):
            yield Problem(key, f"{file}: sources: {source}: no such file or folder")
    if names is not None and (not _is_list(names, str) or len(names) != count):
        yield Problem(key, f"{file}: names: a list of {count} names is expected, one for each of the sources")
    if schedule is not None:
        yield from _of_schedule(key, file, schedule, count)
    stopping = content.get("stopping", _STOPPING[0])
    if stopping not in _STOPPING:
        yield Problem(key, f"{file}: stopping: {stopping!r} given; allowed: {', '.join(_STOPPING)}")


def _of_schedule(key: str, file: str, schedule: Any, count: int) -> Iterator[Problem]:
    if not _is_list(schedule, dict) or not schedule:
        yield Problem(key, f"{file}: schedule: a list of mappings with schedule_type and weights is expected")
        return
    for index, entry in enumerate(schedule):
        kind, weights, steps = entry.get("schedule_type"), entry.get("weights"), entry.get("steps")
        if kind not in _SCHEDULES:
            yield Problem(
                key, f"{file}: schedule.{index}.schedule_type: {kind!r} given; allowed: {', '.join(_SCHEDULES)}"
            )
        numbers = weights if _is_list(weights, int, float) else []
        if len(numbers) != count or min(numbers) < 0 or not sum(numbers):
            yield Problem(
                key,
                f"{file}: schedule.{index}.weights: a list of {count} weights >= 0 is expected, one for each source",
            )
        is_last = index == len(schedule) - 1
        if (steps is None and (kind == "linear" or not is_last)) or (steps is not None and not _is_count(steps)):
            yield Problem(key, f"{file}: schedule.{index}.steps: a whole number of steps >= 1 is expected")


def _path_of(source: Any) -> str | None:
    """The path of a source, which stands alone or in a mapping."""
    path = source.get("path") if isinstance(source, dict) else source
    return path if isinstance(path, str) and path else None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_list(value: Any, *kinds: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(type(each) in kinds for each in value)
