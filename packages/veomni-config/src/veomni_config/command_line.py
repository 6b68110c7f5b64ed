"""Command-line arguments into a tree: one YAML file, then dotted keys."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from .environment import substitute_environment
from .errors import ConfigError, Origin, Problem
from .node import Node, merge, nested
from .scalar import resolve_scalar
from .schema import ConfigKey, find_key, is_list, is_switch
from .yaml_reader import read_value

_HERE = Origin()


def read_arguments(cls: type[BaseModel], argv: Sequence[str]) -> tuple[str | None, Node, list[Problem]]:
    """The file that the first argument names (None if it is an option), the values of the others, what is wrong.

    `--train.lr 1e-4`, `--train.lr=1e-4`; `--train.use_wandb` and `--no-train.use_wandb` for switches; a list as
    `[a, b]` or one `--key item` for each item; text in quotes is text. The last of two values counts.
    """
    arguments = list(argv)
    file = arguments.pop(0) if arguments and not arguments[0].startswith("--") else None
    tree = Node({}, _HERE)
    problems: list[Problem] = []
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--") or argument == "--":
            problems.append(Problem("", f"{argument!r} belongs to no key; keys are written --section.key", _HERE))
            continue
        name, equals, text = argument[2:].partition("=")
        value = text if equals else None
        if value is None and arguments and not arguments[0].startswith("--") and not _negated(cls, name):
            value = arguments.pop(0)
        path = tuple(name.removeprefix("no-").split(".")) if _negated(cls, name) else tuple(name.split("."))
        key = find_key(cls, path)
        node = _value(name, path, key, value)
        if not all(path):
            problems.append(Problem("", f"{argument!r} is no key; keys are written --section.key", _HERE))
            continue
        before = tree.find(path)
        single = not (node.problem or isinstance(node.value, list | dict | None))
        if key and key.path == path and is_list(key.field) and single:
            earlier = before.value if before and isinstance(before.value, list) else []
            node = Node([*earlier, node], _HERE)
        tree = merge(tree, nested(path, node))
    return file, tree, problems


def _negated(cls: type[BaseModel], name: str) -> bool:
    return name.startswith("no-") and find_key(cls, tuple(name.split("."))) is None


def _value(name: str, path: tuple[str, ...], key: ConfigKey | None, text: str | None) -> Node:
    switch = key is not None and key.path == path and is_switch(key.field)
    if name != ".".join(path):
        if key and not switch:
            return Node(None, _HERE, problem=f"--{name} is for keys that are true or false")
        problem = f"--{name} takes no value, --{'.'.join(path)} does" if text is not None else None
        return Node(False, _HERE, problem=problem)
    if text is None:
        problem = f"a value is missing: --{name} VALUE" if key and not switch else None
        return Node(True, _HERE, problem=problem)
    if text == "":
        return Node(None, _HERE, problem="no value given: write null for none, '' for empty text, or leave it out")
    return parse_value(text)


def parse_value(text: str) -> Node:
    """One value of the command line: a list, a mapping, quoted text, or a plain scalar that may hold any character."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return Node(None, _HERE, problem=f"{text!r} is not UTF-8")
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return read_value(text, _HERE)
        except ConfigError as error:
            return Node(text, _HERE, text, problem=error.problems[0].text)
    filled, problem = substitute_environment(text)
    return Node(resolve_scalar(filled), _HERE, filled, problem)
