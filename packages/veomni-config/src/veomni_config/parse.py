"""From a file and a command line to a checked configuration."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel

from .check import Further, check
from .command_line import read_arguments
from .errors import Origin, Problem
from .node import Key, Node, merge
from .schema import config_keys, find_key
from .yaml_reader import read_file

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class ConfigWarning(UserWarning):
    """A configuration that loads, with a key in it that has no effect."""


@dataclass(frozen=True, slots=True)
class Resolved(Generic[ConfigT]):
    """A configuration, and the tree of what was written for it."""

    config: ConfigT
    tree: Node


def parse_args(cls: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """The configuration that a command line describes: `[run.yaml] [--section.key value ...]`, None for `sys.argv[1:]`.

    The command line beats the file, the file beats what it `extends`, that beats the defaults. Raises ConfigError with
    one line for each thing that is wrong, and never anything else for what a user can write. A key that is kept for
    old files and has no effect gives a ConfigWarning.
    """
    return resolve(cls, argv).config


def resolve(
    cls: type[ConfigT],
    argv: Sequence[str] | None = None,
    further: Further = lambda *_: (),
    written: Node | None = None,
) -> Resolved[ConfigT]:
    """`parse_args`, with the tree that says where each value was written; `further` may find more that is wrong.

    `written` is the file's tree, where that was read already: a pipe can be read once.
    """
    file, tree, problems = _read(cls, sys.argv[1:] if argv is None else argv, written)
    start = Origin(file, 1) if file is not None else Origin()
    config = check(cls, tree, start, problems, further)
    warn_of_legacy_keys(cls, tree)
    return Resolved(config, tree)


def unknown_keys(cls: type[BaseModel], argv: Sequence[str], written: Node) -> int:
    """How many keys of a file and a command line `cls` does not have."""

    def count(node: Node, path: tuple[Key, ...]) -> int:
        if find_key(cls, path):
            return 0
        inside = node.value if isinstance(node.value, dict) else {}
        return sum(count(child, (*path, name)) for name, child in inside.items()) if inside else 1

    return count(_read(cls, argv, written)[1], ())


def _read(cls: type[BaseModel], argv: Sequence[str], written: Node | None) -> tuple[str | None, Node, list[Problem]]:
    """The file's name, what is written in it and on the command line, and what is wrong with the command line."""
    file, overrides, problems = read_arguments(cls, argv)
    tree = merge(written or read_file(file), overrides) if file is not None else overrides
    return file, tree, problems


def warn_of_legacy_keys(cls: type[BaseModel], tree: Node) -> None:
    """A ConfigWarning for each key in `tree` that has no effect."""
    for key in config_keys(cls):
        node = tree.find(key.path)
        if key.legacy and node is not None:
            warnings.warn(f"{node.origin}: {key.dotted}: has no effect: {key.legacy}", ConfigWarning, stacklevel=4)
