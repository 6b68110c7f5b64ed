"""From the tree of what was written to a configuration, or to all that is wrong with it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError, create_model

from .errors import ConfigError, Origin, Problem
from .newer_layout import misspelt, nearest_block, newer_layout_hint
from .node import Key, Node
from .provenance import source_of
from .schema import allowed, config_keys, find_key, fit, is_optional, nearest_key, section_class, words_of
from .section import RULES_LATER, Section

ConfigT = TypeVar("ConfigT", bound=BaseModel)


Further: TypeAlias = Callable[[BaseModel, Collection[str], Collection[str]], Iterable[Problem]]


def check(
    cls: type[ConfigT],
    tree: Node,
    start: Origin,
    problems: Iterable[Problem] = (),
    further: Further = lambda *_: (),
) -> ConfigT:
    """The configuration that `tree` holds. Raises ConfigError with `problems` and all others that are found.

    A key that is missing altogether is reported at its section or, without that, at `start`. `further` finds more in
    the configuration, where the keys that it is given next are wrong and hold stand-ins, those after break rules.
    """
    checking = _Check(cls, tree, start, list(problems))
    values = checking.section(cls, tree, ())
    checking.unusable = frozenset(checking.bad)
    try:
        config = cls.model_validate(values, context=RULES_LATER)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            checking.invalid(detail)
        config = None
    if checking.bad:
        config = _without(cls, values, checking.bad)
    if config is not None:
        checking.rules(config, ())
        for problem in further(config, [".".join(path) for path in checking.bad], checking.in_broken_rules):
            node = tree.find(tuple(problem.key.split(".")))
            checking.problems.append(Problem(problem.key, problem.text, node.origin if node else start))
    if checking.problems or config is None:
        raise ConfigError(checking.sorted_problems())
    return config


@dataclass(slots=True)
class _Check:
    cls: type[BaseModel]
    tree: Node
    start: Origin
    problems: list[Problem]
    bad: set[tuple[str, ...]] = field(default_factory=set)  # keys that are reported, which no rule may read
    unusable: frozenset[tuple[str, ...]] = frozenset()  # those of them that pydantic does not see
    in_broken_rules: set[str] = field(default_factory=set)
    told: set[tuple[Key, ...]] = field(default_factory=set)  # what pydantic found
    newer: set[Problem] = field(default_factory=set)  # blocks of the newer layout in files

    def report(self, path: tuple[Key, ...], text: str, origin: Origin) -> None:
        self.problems.append(Problem(".".join(map(str, path)), text, origin))

    def sorted_problems(self) -> list[Problem]:
        """By file and line, the command line last; the newer layout is told once for a file."""
        told: dict[Problem | str, Problem] = {}
        for problem in sorted(self.problems, key=_order):
            told.setdefault(problem.text if problem in self.newer else problem, problem)
        return list(told.values())

    def section(self, cls: type[BaseModel], node: Node, path: tuple[str, ...]) -> dict[str, Any]:
        """The plain values of a section, without what is unknown or cannot be used."""
        values: dict[str, Any] = {}
        items = node.value if isinstance(node.value, dict) else {}
        for name in items:
            if str(name) not in cls.model_fields:
                self.unknown((*path, name), items[name])
        for name, info in cls.model_fields.items():
            here = (*path, name)
            child = items.get(name)
            inner = section_class(info.annotation)
            if inner is not None:
                if child is None and not info.is_required():
                    continue
                if child and child.value is None and not child.problem and is_optional(info):
                    values[name] = None
                    continue
                child = child or Node({}, self.start if not path else node.origin)
                if not child.problem and child.value is not None and not isinstance(child.value, dict):
                    child = Node({}, child.origin, problem=f"{show(child)} given; allowed: a mapping of keys")
                if child.problem:
                    self.report(here, child.problem, child.origin)
                    self.bad.add(here)
                values[name] = self.section(inner, child, here)
            elif child is not None:
                if isinstance(child.value, dict) and not allowed(info).startswith("mapping"):
                    hint = newer_layout_hint(here, child)  # of a block with the name of our key: `train.optimizer`
                    if hint:
                        self.unknown(here, child)
                        self.bad.add(here)
                        continue
                child = fit(child, info.annotation, allowed(info))
                if not self.broken(here, child):
                    values[name] = child.plain()
        return values

    def report_newer_layout(self, path: tuple[Key, ...], hint: str, origin: Origin) -> None:
        self.report(path, hint, origin)
        if origin.file:
            self.newer.add(self.problems[-1])

    def broken(self, path: tuple[Key, ...], node: Node) -> bool:
        """Whether a value, or anything in it, cannot be used; that is reported."""
        found = list(node.problems(path))
        for place, part in found:
            self.report(place, str(part.problem), part.origin)
            self.bad.add(self.key_of(place))
        return bool(found)

    def unknown(self, path: tuple[Key, ...], node: Node) -> None:
        if path == ("help",) and not node.origin.file:
            self.report(path, "every key is explained by `veomni-config reference`", node.origin)
            return
        if not node.origin.file and isinstance(node.value, dict) and node.value:
            for name, child in node.value.items():  # arguments name leaves, not the first unknown part of their path
                self.unknown((*path, name), child)
            return
        if hint := newer_layout_hint(path, node):
            self.report_newer_layout(path, hint, node.origin)
            self.misspelt(path, node)
            return
        if hint := misspelt(".".join(map(str, path))):
            self.report(path, hint, node.origin)
            return
        near = nearest_key(self.cls, path) or nearest_block(path)
        dashes = "" if node.origin.file else "--"
        if near and (near,) == path:  # the key itself, as one word with a dot
            section, _, name = near.rpartition(".")
            self.report(path, f"unknown key: write {name} below {section}", node.origin)
            return
        hint = f", did you mean {dashes}{near}?" if near else ""
        self.report(path, f"unknown key{hint}", node.origin)

    def misspelt(self, path: tuple[Key, ...], block: Node) -> None:
        """Report what a block of the newer layout does not have."""
        for name, child in block.value.items() if isinstance(block.value, dict) else ():
            here = (*path, name)
            if not child.origin.file:
                self.unknown(here, child)
            elif hint := misspelt(".".join(map(str, here))):
                self.report(here, hint, child.origin)
            else:
                self.misspelt(here, child)

    def key_of(self, path: tuple[Key, ...]) -> tuple[str, ...]:
        key = find_key(self.cls, path)
        return key.path if key else tuple(map(str, path))

    def invalid(self, detail: Any) -> None:
        """Report what pydantic found, in words of the schema."""
        path = self.located(detail["loc"])
        key, node = find_key(self.cls, path), self.tree.find(path)
        if any(path[:depth] in self.unusable for depth in range(1, len(path) + (detail["type"] == "missing"))):
            return
        if any(path[: len(other)] == other or other[: len(path)] == path for other in self.told):
            return  # another alternative of a union
        self.told.add(path)
        self.bad.add(self.key_of(path))
        origin = node.origin if node else self.origin_of_missing(path)
        if detail["type"] == "missing":
            if self.newer:  # it is likely there, under its nested name
                return
            words = key.field.description or allowed(key.field) if key else "a section"
            self.report(path, f"required and not given: {words.rstrip('.')}", origin)
        elif detail["type"] in ("value_error", "assertion_error"):
            self.report(path, str(detail["ctx"]["error"]), origin)
        elif detail["loc"][-1:] == ("[key]",):
            expected = detail.get("ctx", {}).get("expected")
            self.report(path, f"unknown key; allowed: {expected or 'text, in quotes if it is a number'}", origin)
        elif key is None or key.path != path or node is None:
            words = detail["msg"].removeprefix("Input should be ").split(", unable to parse")[0]
            words = words.replace("a valid string", "text").replace("a valid ", "a ")
            self.report(path, f"{show(node)} given; allowed: {words}", origin)
        else:
            nearest = difflib.get_close_matches(str(node.value), words_of(key.field), 1, 0.5)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            hint = " and finite" if detail["type"] == "finite_number" else hint
            self.report(path, f"{show(node)} given; allowed: {allowed(key.field)}{hint}", origin)

    def located(self, loc: Iterable[Key]) -> tuple[Key, ...]:
        """The path of a value from pydantic's, which also names the alternatives of a union."""
        path: tuple[Key, ...] = ()
        for part in loc:
            longer = (*path, part)
            if find_key(self.cls, path):
                known = self.tree.find(longer) is not None
            else:
                known = any(key.path[: len(longer)] == longer for key in config_keys(self.cls))
            if not known:
                break
            path = longer
        return path

    def origin_of_missing(self, path: tuple[Key, ...]) -> Origin:
        for depth in range(len(path) - 1, 0, -1):
            node = self.tree.find(path[:depth])
            if node is not None and (node.origin.file or not self.start.file):
                return node.origin
        return self.start

    def rules(self, section: BaseModel, path: tuple[str, ...]) -> None:
        """Report the broken rules of a section and of those in it."""
        if isinstance(section, Section):
            below = {".".join(bad[len(path) :]) for bad in self.bad if bad[: len(path)] == path}
            if "" not in below:
                for keys, sentence in section.broken_rules(below):
                    self.report_rule(section, path, keys, sentence)
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                self.rules(value, (*path, name))

    def report_rule(self, section: BaseModel, path: tuple[str, ...], keys: tuple[str, ...], sentence: str) -> None:
        """A broken rule is reported where its first key that is not a default was written, with all values."""
        given = []
        first: tuple[tuple[str, ...], Node] | None = None
        for key in keys:
            full = (*path, *key.split("."))
            node = self.tree.find(full)
            if node is not None and first is None:
                first = full, node
            value: Any = section
            for part in key.split("."):
                value = getattr(value, part, None)
            given.append(f"{'.'.join(full)}={_word(value)} ({source_of(self.cls, self.tree, full, value)})")
        where, origin = (first[0], first[1].origin) if first else ((*path, *keys[0].split(".")), self.start)
        self.in_broken_rules.update(".".join((*path, key)) for key in keys)
        self.report(where, f"{sentence}; given: {', '.join(given)}", origin)


def show(node: Node | None) -> str:
    """A value in a message, as it was written where it is a scalar."""
    if node is None or (node.value is None and node.text == ""):
        return "nothing"
    if isinstance(node.value, list | dict):
        return "a list" if isinstance(node.value, list) else "a mapping"
    if isinstance(node.value, str):
        return repr(node.value if len(node.value) < 80 else node.value[:77] + "...")
    return node.text or _word(node.value)


def _word(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _order(problem: Problem) -> tuple[bool, str, int]:
    origin = problem.origin or Origin()
    return not origin.file, origin.file, origin.line


def _without(cls: type[ConfigT], values: dict[str, Any], bad: set[tuple[str, ...]]) -> ConfigT | None:
    """The configuration with stand-ins for the keys in `bad`, so that the rules between the others can be seen."""

    def lenient(section: type[BaseModel], given: dict[str, Any], path: tuple[str, ...]) -> type[BaseModel]:
        fields: dict[str, Any] = {}
        for name, info in section.model_fields.items():
            here = (*path, name)
            inner = section_class(info.annotation)
            if inner is not None and given.get(name) is not None:
                fields[name] = (lenient(inner, given[name], here), ...)
            elif here in bad:
                given.pop(name, None)
                fields[name] = (Any, None if info.is_required() else info.get_default(call_default_factory=True))
        return create_model(section.__name__, __base__=section, **fields) if fields else section

    try:
        stand_in = lenient(cls, values, ()).model_validate(values, context=RULES_LATER)
    except Exception:  # a validator of a subclass stumbles over a stand-in: its rules are seen when the keys are right
        return None
    assert isinstance(stand_in, cls)
    return stand_in
