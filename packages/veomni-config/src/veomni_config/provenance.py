"""Where each value of a configuration came from."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .node import Key, Node
from .schema import find_key
from .yaml_writer import plain_value


def source_of(cls: type[BaseModel], tree: Node, path: tuple[Key, ...], value: Any) -> str:
    """`file:line` or `command line` of the value at `path`, or `default`, or `derived` where it follows from others."""
    node = tree.find(path)
    if node is not None and (node.value is not None or not value):
        return str(node.origin)
    key = find_key(cls, path)
    default = plain_value(key.field.get_default(call_default_factory=True)) if key else None
    return "default" if plain_value(value) == default else "derived"
