"""A resolved configuration as YAML, with where each value came from."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .parse import Resolved
from .provenance import source_of
from .yaml_writer import key_to_yaml, plain_config, to_yaml


def show_config(resolved: Resolved[BaseModel]) -> str:
    """YAML that loads equal; beside each value `default`, `file:line`, `command line` or `derived`."""
    rows: list[tuple[str, str]] = []

    def add(mapping: dict[Any, Any], path: tuple[Any, ...]) -> None:
        for name, value in mapping.items():
            here = (*path, name)
            head = f"{'  ' * len(path)}{key_to_yaml(name)}:"
            if isinstance(value, dict) and value:
                rows.append((head, ""))
                add(value, here)
            else:
                source = source_of(type(resolved.config), resolved.tree, here, value)
                rows.append((f"{head} {to_yaml(value, flow=True)}", source))

    add(plain_config(resolved.config), ())
    width = min(60, max(len(text) for text, _ in rows))
    return "".join(f"{text:{width}}  # {source}\n" if source else f"{text}\n" for text, source in rows)
