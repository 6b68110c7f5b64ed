"""What two configurations differ in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from .parse import Resolved
from .provenance import source_of
from .yaml_writer import plain_config, to_yaml

_ABSENT = object()


def diff_configs(a: Resolved[BaseModel], b: Resolved[BaseModel]) -> list[str]:
    """One line for each key whose resolved value differs, with where each of the two values came from."""
    left, right = dict(_leaves(plain_config(a.config))), dict(_leaves(plain_config(b.config)))
    lines = []
    for path in dict.fromkeys((*left, *right)):
        old, new = left.get(path, _ABSENT), right.get(path, _ABSENT)
        if old is _ABSENT or new is _ABSENT or type(old) is not type(new) or old != new:
            lines.append(f"{'.'.join(map(str, path))}: {_described(a, path, old)} -> {_described(b, path, new)}")
    return lines


def _leaves(value: dict[Any, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from _leaves(item, (*path, name))
        elif not (isinstance(item, dict) and len(path) > 0 and not item):
            yield (*path, name), item


def _described(resolved: Resolved[BaseModel], path: tuple[Any, ...], value: Any) -> str:
    if value is _ABSENT:
        return "not there"
    return f"{to_yaml(value, flow=True)} ({source_of(type(resolved.config), resolved.tree, path, value)})"
