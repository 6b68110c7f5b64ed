"""YAML files into trees of nodes with line numbers, `extends` followed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .environment import substitute_environment
from .errors import ConfigError, Origin, Problem
from .node import Key, Node, merge
from .scalar import resolve_scalar

MOST_DEPTH = 50
MOST_VALUES = 100_000  # aliases of aliases can make billions out of ten lines

_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS: dict[Any, tuple[Any, str]] = {
    _TAG + "int": (int, "a whole number"),
    _TAG + "float": (float | int, "a number"),
    _TAG + "bool": (bool, "true or false"),
    _TAG + "null": (type(None), "null"),
}


def read_file(path: str | Path) -> Node:
    """The mapping that a YAML file holds, merged over that of the file which it `extends`.

    `extends: other.yaml` is relative to the file it stands in and may go on over several levels; a cycle is an error.
    Raises ConfigError, with the line, where a file cannot be read as one mapping of plain values.
    """
    return _read_chain(Path(path), (), None)


def _read_chain(path: Path, below: tuple[Path, ...], extends: Origin | None) -> Node:
    """`below` are the resolved files that lead to `path` by their `extends`, the last of them at `extends`."""
    key, here = ("extends", extends) if extends else ("", Origin())
    try:
        chain = (*below, path.resolve())
        data = path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise ConfigError([Problem(key, f"{path}: {reason}", here)]) from None
    if chain[-1] in below:
        names = " -> ".join(file.name for file in chain)
        raise ConfigError([Problem(key, f"{names} is a cycle", here)])

    tree = read_text(decode(data, str(path)), str(path))
    assert isinstance(tree.value, dict)
    parent = tree.value.pop("extends", None)
    if parent is None:
        return tree
    if parent.problem or not isinstance(parent.value, str) or not parent.value:
        text = parent.problem or f"{parent.plain()!r} given; allowed: the path of one YAML file"
        raise ConfigError([Problem("extends", text, parent.origin)])
    if len(chain) > MOST_DEPTH:
        raise ConfigError([Problem("extends", f"more than {MOST_DEPTH} levels", parent.origin)])
    return merge(_read_chain(path.parent / parent.value, chain, parent.origin), tree)


def decode(data: bytes, file: str) -> str:
    """UTF-8 bytes (a byte-order mark is skipped) to text; raises ConfigError with the line of a byte that is not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem("", f"byte 0x{data[error.start]:02x} is not UTF-8", Origin(file, line))]) from None


def read_text(text: str, file: str, *, environment: bool = True) -> Node:
    """The mapping that `text` holds (an empty one for no text); `file` is its name for messages.

    Without `environment` references to it stay as they are written.
    """
    tree = _Reader(text, file, None, environment).read()
    if tree.value is None and not tree.problem:
        return Node({}, tree.origin)
    if not isinstance(tree.value, dict) or tree.problem:
        raise ConfigError([Problem("", tree.problem or "a mapping of sections is expected here", tree.origin)])
    return tree


def read_value(text: str, origin: Origin) -> Node:
    """One value that is given outside of a file (`[a, b]` on the command line); all of it lies at `origin`."""
    return _Reader(text, origin.file, origin).read()


@dataclass(frozen=True, slots=True)
class _Anchor:
    node: Node
    values: int
    height: int


class _Reader:
    """One document's events into nodes. PyYAML's own composer forgets where keys and aliases stood."""

    def __init__(self, text: str, file: str, origin: Origin | None, environment: bool = True) -> None:
        self.environment = environment
        self.text, self.file, self.origin = text, file, origin
        self.anchors: dict[str, _Anchor | None] = {}  # None while its node is being read
        self.values = 0

    def read(self) -> Node:
        try:
            self.events = yaml.parse(self.text, Loader=yaml.SafeLoader)
            next(self.events)  # the stream
            if isinstance(next(self.events), yaml.StreamEndEvent):
                return Node(None, self.at(1), text="")
            node, _ = self.node(next(self.events), 0)
            next(self.events)  # the document's end
            more = next(self.events)
            if not isinstance(more, yaml.StreamEndEvent):
                raise self.error(_line(more), "a second document begins here, one is expected")
        except yaml.reader.ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            code = error.character if isinstance(error.character, int) else ord(error.character)
            raise self.error(line, f"the character U+{code:04X} is not allowed in YAML") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = ", ".join(part for part in (error.context, error.problem) if part)
            raise self.error(mark.line + 1 if mark else 1, f"not YAML: {what}") from None
        except ValueError as error:  # PyYAML leaves a number in a %YAML line or an escape unchecked
            if isinstance(error, ConfigError):
                raise
            raise self.error(1, f"not YAML: {error}") from None
        return node

    def at(self, line: int) -> Origin:
        return self.origin or Origin(self.file, line)

    def error(self, line: int, text: str) -> ConfigError:
        return ConfigError([Problem("", text, self.at(line))])

    def count(self, values: int, line: int) -> None:
        self.values += values
        if self.values > MOST_VALUES:
            raise self.error(line, f"more than {MOST_VALUES:,} values, aliases followed")

    def node(self, event: Any, depth: int, key_line: int | None = None) -> tuple[Node, int]:
        """The node that begins with `event`, and how many levels it is high."""
        line = key_line or _line(event)
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            anchor = self.anchors.get(name)
            if anchor is None:
                why = "stands for itself" if name in self.anchors else "has no anchor before it"
                raise self.error(line, f"*{name} {why}")
            self.count(anchor.values, line)
            if depth + anchor.height > MOST_DEPTH:
                raise self.error(line, f"nested more than {MOST_DEPTH} levels deep, aliases followed")
            return replace(anchor.node, origin=self.at(line)), anchor.height
        if depth > MOST_DEPTH:
            raise self.error(line, f"nested more than {MOST_DEPTH} levels deep")
        name, before = event.anchor or "", self.values
        if name:
            self.anchors[name] = None
        self.count(1, line)
        if isinstance(event, yaml.ScalarEvent):
            node, height = self.scalar(event, line), 0
        elif isinstance(event, yaml.SequenceStartEvent):
            node, height = self.sequence(line, depth)
        else:
            node, height = self.mapping(line, depth)
        if not isinstance(event, yaml.ScalarEvent) and event.tag not in (None, "!", _TAG + "seq", _TAG + "map"):
            node = replace(node, problem=f"the tag {_short(event.tag)} is not allowed here, only plain values are")
        if name:
            self.anchors[name] = _Anchor(node, self.values - before, height)
        return node, height

    def scalar(self, event: Any, line: int) -> Node:
        """A plain scalar is resolved after its environment references are filled in, a quoted one stays text."""
        text, problem = substitute_environment(event.value) if self.environment else (event.value, None)
        if event.tag in (None, "!") and event.style is None:
            return Node(resolve_scalar(text), self.at(line), text, problem)
        if event.tag in (None, "!", _TAG + "str"):
            return Node(text, self.at(line), problem=problem)
        kind, words = _SCALAR_TAGS.get(event.tag, (None, ""))
        value = resolve_scalar(text)
        if kind is None:
            problem = f"the tag {_short(event.tag)} is not allowed here, only plain values are"
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            problem = problem or f"{text!r} is not {words}"
        return Node(value, self.at(line), text, problem)

    def sequence(self, line: int, depth: int) -> tuple[Node, int]:
        items, height = [], 0
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            item, below = self.node(event, depth + 1)
            items.append(item)
            height = max(height, below + 1)
        return Node(items, self.at(line)), height

    def mapping(self, line: int, depth: int) -> tuple[Node, int]:
        """Keys may not be given twice; `<<` brings in the keys of other mappings that are not given here."""
        items: dict[Key, Node] = {}
        brought: dict[Key, Node] = {}
        height = 0
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key_line = _line(event)
            key, merges = self.key(event, key_line)
            node, below = self.node(next(self.events), depth + 1, key_line)
            height = max(height, below + 1)
            if merges:
                for source in node.value if isinstance(node.value, list) else [node]:
                    if not isinstance(source.value, dict):
                        raise self.error(key_line, "'<<' takes a mapping or a list of mappings")
                    brought = source.value | brought
            elif key in items:
                first = f"given twice, first at line {items[key].origin.line}"
                items[key] = replace(node, problem=first)
            else:
                items[key] = node
        return Node(brought | items, self.at(line)), height

    def key(self, event: Any, line: int) -> tuple[Key, bool]:
        """A key, and whether it is the merge key."""
        if isinstance(event, yaml.AliasEvent):
            node, _ = self.node(event, 0)
            if not isinstance(node.value, list | dict):
                return node.value, False
        if not isinstance(event, yaml.ScalarEvent):
            raise self.error(line, "a key must be one word or number")
        if event.anchor:
            self.anchors[event.anchor] = _Anchor(self.scalar(event, line), 1, 0)
        plain = event.tag in (None, "!") and event.style is None
        value = resolve_scalar(event.value) if plain else event.value
        if isinstance(value, bool):  # for a mapping, True is the same key as 1
            value = event.value
        return value, plain and event.value == "<<"


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")
