"""Configurations into YAML that the reader gives back equal."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from .environment import escape_environment
from .scalar import BOOL, FLOAT, INT, NULL
from .schema import ConfigKey, section_class


def dump_config(config: BaseModel, path: str | Path) -> None:
    """Write all keys of `config`, derived values included, so that `parse_args` of that file gives an equal one.

    Keys without an effect are left out where they have their default.
    """
    Path(path).write_text(to_yaml(plain_config(config)), encoding="utf-8")


def plain_config(config: BaseModel) -> dict[str, Any]:
    """The values of all keys as plain nested dictionaries."""
    plain: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel) and section_class(field.annotation):
            plain[name] = plain_config(value)
        elif not (ConfigKey((name,), field).legacy and value == field.default):
            plain[name] = plain_value(value)
    return plain


def plain_value(value: Any) -> Any:
    """`value` made of dictionaries, lists and scalars alone."""
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, dict):
        return {plain_value(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain_value(item) for item in value), key=str)
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def to_yaml(value: Any, *, flow: bool = False) -> str:
    """`value` as YAML text; `flow` puts it on one line."""
    return _write(_escaped(value), flow)


def key_to_yaml(key: Any) -> str:
    """A key as YAML text; the reader looks for environment references in values alone."""
    return _write(key, flow=True)


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return escape_environment(value) if isinstance(value, str) else value


def _write(value: Any, flow: bool) -> str:
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow or None,
        width=2**31 if flow else 120,
    )
    return text.removesuffix("...\n").removesuffix("\n") if flow else text


class _Dumper(yaml.SafeDumper):
    """Quotes what a reader of YAML 1.1 or our own would take for something else than text, and never uses aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.Node:
        style = None if data.isprintable() else '"'  # with escapes, so that line breaks stay what they are
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)

    def represent_number(self, data: float) -> yaml.Node:
        text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(data), repr(data))
        if "." not in text:  # 1e-05 is text for readers of YAML 1.1
            text = text.replace("e", ".0e")
        return self.represent_scalar("tag:yaml.org,2002:float", text)


for _tag, _pattern in (("null", NULL), ("bool", BOOL), ("int", INT), ("float", FLOAT)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern.pattern})\\Z"), None)
_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(float, _Dumper.represent_number)
