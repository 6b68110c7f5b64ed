"""From the tree of what was written to a configuration, or to all that is wrong with it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, create_model

from .errors import ConfigError, Origin, Problem
from .newer_layout import newer_layout_hint
from .node import Key, Node
from .schema import allowed, config_keys, find_key, fit, nearest_key, section_class, words_of
from .section import RULES_LATER, Section

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def check(cls: type[ConfigT], tree: Node, start: Origin, problems: Iterable[Problem] = ()) -> ConfigT:
    """The configuration that `tree` holds. Raises ConfigError with `problems` and all others that are found.

    A key that is missing altogether is reported at its section or, without that, at `start`.
    """
    checking = _Check(cls, tree, start, list(problems))
    values = checking.section(cls, tree, ())
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
    newer: set[Problem] = field(default_factory=set)  # blocks of the newer layout

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
                        self.report_newer_layout(here, hint, child.origin)
                        self.bad.add(here)
                        continue
                child = fit(child, info.annotation, allowed(info))
                if not self.broken(here, child):
                    values[name] = child.plain()
        return values

    def report_newer_layout(self, path: tuple[Key, ...], hint: str, origin: Origin) -> None:
        self.report(path, hint, origin)
        self.newer.add(self.problems[-1])

    def broken(self, path: tuple[Key, ...], node: Node) -> bool:
        """Whether a value, or anything in it, cannot be used; that is reported."""
        if node.problem:
            self.report(path, node.problem, node.origin)
            self.bad.add(self.key_of(path))
            return True
        inside: Iterable[tuple[Key, Node]] = ()
        if isinstance(node.value, dict):
            inside = node.value.items()
        elif isinstance(node.value, list):
            inside = enumerate(node.value)
        broken = False
        for part, child in inside:
            broken |= self.broken((*path, part), child)
        return broken

    def unknown(self, path: tuple[Key, ...], node: Node) -> None:
        if path == ("help",) and not node.origin.file:
            self.report(path, "every key is explained by `veomni-config reference`", node.origin)
            return
        if not node.origin.file:  # the argument names a leaf, not the first unknown part of its path
            path, node = self.first_leaf(path, node)
        if hint := newer_layout_hint(path, node):
            self.report_newer_layout(path, hint, node.origin)
            return
        nearest = nearest_key(self.cls, path)
        dashes = "" if node.origin.file else "--"
        hint = f", did you mean {dashes}{nearest}?" if nearest else ""
        self.report(path, f"unknown key{hint}", node.origin)

    def first_leaf(self, path: tuple[Key, ...], node: Node) -> tuple[tuple[Key, ...], Node]:
        while isinstance(node.value, dict) and node.value:
            name, node = next(iter(node.value.items()))
            path = (*path, name)
        return path, node

    def key_of(self, path: tuple[Key, ...]) -> tuple[str, ...]:
        key = find_key(self.cls, path)
        return key.path if key else tuple(map(str, path))

    def invalid(self, detail: Any) -> None:
        """Report what pydantic found, in words of the schema."""
        path = self.located(detail["loc"])
        key, node = find_key(self.cls, path), self.tree.find(path)
        if any(path[:depth] in self.bad for depth in range(1, len(path) + (detail["type"] == "missing"))):
            return
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
            self.report(path, f"{show(node)} given; {detail['msg'][:1].lower()}{detail['msg'][1:]}", origin)
        else:
            nearest = difflib.get_close_matches(str(node.value), words_of(key.field), 1, 0.5)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
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
                value = getattr(value, part)
            given.append(f"{'.'.join(full)}={_word(value)} ({node.origin if node else 'default'})")
        where, origin = (first[0], first[1].origin) if first else ((*path, *keys[0].split(".")), self.start)
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
            if inner is not None and name in given:
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
