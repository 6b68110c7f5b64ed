"""Values before they are checked: a tree that remembers where each of them was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from .errors import Origin

Key: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, a list or a mapping of nodes.

    `text` holds a plain (unquoted) scalar as it was written, so that a key that wants text gets `007` and not 7.
    `problem` says why the value cannot be used; such a node is reported and never read.
    """

    value: str | int | float | bool | list[Node] | dict[Key, Node] | None
    origin: Origin
    text: str | None = None
    problem: str | None = None

    def plain(self) -> Any:
        """The value as Python lists, dictionaries and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def problems(self, path: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Node]]:
        """The nodes, in this one or it alone, that cannot be used, with their paths."""
        if self.problem:
            yield path, self
        elif isinstance(self.value, dict | list):
            items = self.value.items() if isinstance(self.value, dict) else enumerate(self.value)
            for part, child in items:
                yield from child.problems((*path, part))

    def find(self, path: tuple[Key, ...]) -> Node | None:
        """The node at `path`, or None."""
        node: Node | None = self
        for part in path:
            if node is None:
                return None
            if isinstance(node.value, dict):
                node = node.value.get(part)
            elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
            else:
                return None
        return node


def merge(below: Node, above: Node) -> Node:
    """Mappings are merged key by key; anything else in `above` replaces what is in `below`.

    A key that `above` leaves empty over a mapping (`train:` without anything under it) says nothing.
    """
    if isinstance(below.value, dict) and above.value is None and above.text == "" and not above.problem:
        return below
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, above.origin if above.origin.file else below.origin, problem=above.problem or below.problem)


def nested(path: tuple[str, ...], node: Node) -> Node:
    """`node` inside mappings that lead to it by `path`."""
    for part in reversed(path):
        node = Node({part: node}, node.origin)
    return node
