"""A file of the newer, nested layout rewritten into ours, comments kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from .errors import ConfigError, Origin, Problem
from .newer_layout import BLOCKS, DEFAULTS, KERNELS, RENAMED, VALUES, misspelt, why_dropped
from .yaml_reader import read_text
from .yaml_writer import key_to_yaml

_SECTIONS = ("model", "data", "train")
_OURS = set(RENAMED.values())  # `train.optimizer` is a key here and a block there


@dataclass(frozen=True, slots=True)
class Migration:
    """The rewritten file, and one line for each key that was renamed, dropped, changed or added."""

    text: str
    report: tuple[str, ...]


@dataclass(slots=True)
class _Entry:
    """One key of the old file, the comments above and beside it, and its value as it is written.

    `value` is what stands on the line of the key, `block` the lines below it, their common indentation taken off.
    """

    key: str
    line: int
    above: list[str]
    value: str
    block: list[str] = field(default_factory=list)
    beside: str = ""

    def is_empty(self) -> bool:
        return not self.block and self.value in ("", "{}", "null", "~")

    def written_as(self, name: str) -> list[str]:
        head = " ".join(part for part in (f"{key_to_yaml(name)}:", self.value) if part)
        head = f"{head}  {self.beside}" if self.beside else head
        return [head, *(f"  {line}" if line else line for line in self.block)]


def migrate(text: str, file: str) -> Migration:
    """Rewrite `text`, a file of the newer layout; a file that has none of its keys stays as it is.

    What has no counterpart stays in its place as a comment. What a left-out key means there but not here is added.
    Values that we do not know (`lion`) stay, for the parser to refuse. `file` is the name for messages. Raises
    ConfigError where `text` is no YAML that could be a configuration, or has a key that the newer layout does not know.
    """
    entries, comments, rest = _read(text, file)
    if wrong := [problem for entry in entries for problem in _unknown(entry, file)]:
        raise ConfigError(wrong)
    if not any(entry.key in RENAMED or why_dropped(entry.key) for entry in entries):
        return Migration(text, ())
    report: list[str] = []
    lines: dict[str, list[str]] = {name: [] for name in ("", *comments)}
    originals = {entry.key for entry in entries if not (entry.key in RENAMED or entry.is_empty())}
    renamed = {RENAMED[entry.key] for entry in entries if entry.key in RENAMED}
    written: set[str] = set()
    for entry in entries:
        place = f"{file}:{entry.line}: {entry.key}"
        target = RENAMED.get(entry.key, entry.key)
        section, _, name = target.rpartition(".")
        reason = why_dropped(entry.key)
        if entry.is_empty() and entry.key in BLOCKS:
            reason = "it is empty"
        elif entry.is_empty() and entry.key in renamed:
            reason = "a renamed key takes its place"
        elif target in written or (target != entry.key and target in originals):
            reason = f"{target} is given too"
        if reason:
            report.append(f"{place}: dropped: {reason}")
            first = section.partition(".")[0]
            section = first if first in _SECTIONS else "the end"
            commented = [f"# {line}" for line in entry.written_as(entry.key)]
            new = [*entry.above, f"# dropped by migrate, {reason}:", *commented]
        else:
            written.add(target)
            if target != entry.key:
                report.append(f"{place}: renamed: {target}")
            if entry.key in RENAMED and target in KERNELS and entry.value.strip("'\"") not in KERNELS[target]:
                report.append(f"{place}: changed: the kernel {entry.value} is not known here, auto takes the best one")
                entry.value = "auto"
            if (known_as := VALUES.get((target, entry.value.strip("'\"")))) is not None:
                report.append(f"{place}: changed: {entry.value} is {known_as} here")
                entry.value = known_as
            if target == "extends":
                report.append(f"{place}: unchanged: the file that it names has to be rewritten too")
            new = [*entry.above, *entry.written_as(name)]
        lines.setdefault(section, []).extend(new)
    values = {RENAMED.get(entry.key): entry.value.strip("'\"") for entry in entries}
    pointless = {
        "train.init_device": values.get("train.data_parallel_mode") == "ddp",  # `meta` weights are for shards
        "train.muon_weight_decay": values.get("train.optimizer") != "muon",
    }
    for target, value in DEFAULTS.items():
        if pointless.get(target):
            continue
        if target not in written and "extends" not in written:
            section, _, name = target.rpartition(".")
            report.append(f"{file}: {target}: added: {value}, which is meant there by leaving it out")
            lines.setdefault(section, []).append(f"{name}: {value}  # default of the newer layout")
    output, end = lines.pop(""), lines.pop("the end", [])
    for section, inside in lines.items():
        if inside:
            output += [*comments.get(section, []), f"{section}:"]
            output += [f"  {line}" if line else line for line in inside]
    return Migration("\n".join([*output, *end, *rest]) + "\n", tuple(report))


def _unknown(entry: _Entry, file: str) -> Iterator[Problem]:
    text = misspelt(entry.key)
    if entry.key in BLOCKS and entry.key not in _OURS and not entry.is_empty():
        text = f"{entry.value or 'a list'} given; allowed: a mapping of keys"
    if text:
        yield Problem(entry.key, text, Origin(file, entry.line))


def _read(text: str, file: str) -> tuple[list[_Entry], dict[str, list[str]], list[str]]:
    """The entries of a file in their order, the comments above each section, and the lines after the last entry."""
    tree = read_text(text, file, environment=False)
    if wrong := [Problem(".".join(map(str, path)), str(node.problem), node.origin) for path, node in tree.problems()]:
        raise ConfigError(wrong)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        shared = any(getattr(event, "anchor", None) for event in yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([Problem("", f"not YAML: {error.problem}", Origin(file, line))]) from None
    reading = _Reading(text.splitlines(), written_out=shared)
    if isinstance(root, yaml.MappingNode):
        reading.mapping(root, "", set())
    rest = [line for line in reading.lines[reading.done :] if _is_comment(line)]
    return reading.entries, reading.comments, reading.pending + rest


class _Reading:
    """Walks the nodes of a file beside its lines."""

    def __init__(self, lines: list[str], written_out: bool) -> None:
        self.lines = lines
        self.written_out = written_out  # anchors lose their place, so their values are written where they are used
        self.entries: list[_Entry] = []
        self.comments: dict[str, list[str]] = {}
        self.pending: list[str] = []  # comments above a block, for its first entry
        self.done = 0  # lines that are read

    def mapping(self, node: yaml.MappingNode, prefix: str, hidden: set[str]) -> None:
        """Read a mapping without its `hidden` keys, which are given nearer; its own hide those that `<<` brings."""
        given_nearer = frozenset(hidden)
        hidden.update(key.value for key, _ in node.value if not _merges(key))
        for key, value in node.value:
            if _merges(key):
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(source, yaml.MappingNode):
                        self.mapping(source, prefix, hidden)
                continue
            if key.value in given_nearer:
                continue
            dotted = f"{prefix}{key.value}"
            above = self.above(key.start_mark.line)
            inside = isinstance(value, yaml.MappingNode) and (dotted in _SECTIONS or dotted in BLOCKS)
            if inside or (dotted in _SECTIONS and value.value == ""):
                above += self.comment_after(key.end_mark, colon=True)
                if dotted in _SECTIONS:
                    self.comments.setdefault(dotted, []).extend(above)
                else:
                    self.pending = above
                if inside:
                    self.mapping(value, f"{dotted}.", set())
                    if value.flow_style and not self.written_out:
                        self.pending += self.comment_after(value.end_mark)
                        self.done = max(self.done, value.end_mark.line + 1)
            else:
                self.entries.append(self.entry(dotted, key, value, above))

    def above(self, line: int) -> list[str]:
        """Comments and empty lines between what was read and a key on `line`, after those that wait."""
        found = [each.strip() for each in self.lines[self.done : line] if _is_comment(each)]
        self.done = max(self.done, line + 1)
        waiting, self.pending = self.pending, []
        return waiting + found

    def comment_after(self, mark: Any, colon: bool = False) -> list[str]:
        rest = self.lines[mark.line][mark.column :].lstrip() if mark.line < len(self.lines) else ""
        rest = rest.removeprefix(":").lstrip() if colon else rest
        return [rest.rstrip()] if rest.startswith("#") else []

    def comments_inside(self, value: yaml.Node) -> list[str]:
        """The comments on the lines of a flow value, before its end."""
        texts = [(_at(node.start_mark), _at(node.end_mark)) for node in _scalars(value)]
        end = _at(value.end_mark)
        found = []
        for number in range(value.start_mark.line, value.end_mark.line + 1):
            for match in re.finditer(r"(?<!\S)#", self.lines[number] if number < len(self.lines) else ""):
                here = (number, match.start())
                if _at(value.start_mark) < here < end and not any(start <= here < stop for start, stop in texts):
                    found.append(self.lines[number][match.start() :].rstrip())
                    break
        return found

    def entry(self, dotted: str, key: yaml.Node, value: yaml.Node, above: list[str]) -> _Entry:
        first, last = key.start_mark.line, _last_line(value, self.lines)
        is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        entry = _Entry(dotted, first + 1, above, "")
        is_block_text = isinstance(value, yaml.ScalarNode) and value.style in ("|", ">")
        if self.written_out or (not is_block and last > first) or (is_block and value.start_mark.line == first):
            entry.value = _flow(value)
            if not self.written_out:
                entry.above += self.comments_inside(value)
        elif is_block:
            self.done = max(self.done, last + 1)
            block = self.lines[first + 1 : last + 1]
            margin = min(len(line) - len(line.lstrip()) for line in block if line.strip())
            entry.block = [line[margin:].rstrip() for line in block]
            entry.beside = "".join(self.comment_after(key.end_mark, colon=True))
            return entry
        else:
            entry.value = self.lines[first][value.start_mark.column : value.end_mark.column].strip()
        if is_block_text:
            header = re.match(r"[|>][-+0-9]*\s+(#.*)", self.lines[value.start_mark.line][value.start_mark.column :])
            entry.beside = header[1].rstrip() if header else ""
        else:
            entry.beside = "".join(self.comment_after(key.end_mark if self.written_out else value.end_mark))
        self.done = max(self.done, last + 1 if not self.written_out else first + 1)
        return entry


def _merges(key: yaml.ScalarNode) -> bool:
    return key.value == "<<" and key.style is None


def _is_comment(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from child if isinstance(child, tuple) else (child,)


def _scalars(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    for child in _children(node):
        yield from _scalars(child)


def _at(mark: Any) -> tuple[int, int]:
    return int(mark.line), int(mark.column)


def _last_line(node: yaml.Node, lines: list[str]) -> int:
    """The last line that a value stands on; a block's own end mark is where the next key begins."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        return max(_last_line(child, lines) for child in _children(node))
    end = node.end_mark
    before = lines[end.line][: end.column] if end.line < len(lines) else ""
    return int(end.line) - (not before.strip() and end.line > node.start_mark.line)


def _flow(node: yaml.Node) -> str:
    """A value on one line."""
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(_flow(item) for item in node.value)}]"
    if isinstance(node, yaml.MappingNode):
        return f"{{{', '.join(f'{_flow(key)}: {_flow(value)}' for key, value in node.value)}}}"
    plain = getattr(node, "style", None) is None and not set("\n,[]{}") & set(node.value)
    return str(node.value) if plain else json.dumps(node.value, ensure_ascii=False)
