"""From the characters of a plain scalar to its value, as YAML 1.2 has it: `1e-4` is a number, `no` is a word."""

from __future__ import annotations

import re

INT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
NULL = re.compile(r"~|null|Null|NULL|")

_MOST_DIGITS = 400  # more are no number that anybody means, and int() refuses more than 4,300


def resolve_scalar(text: str) -> str | int | float | bool | None:
    """The value of a plain scalar.

    Differs from YAML 1.2's core schema in one thing: digits may be grouped (`10_000_000`), as in YAML 1.1 and Python.
    """
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text[0] in "tT"
    if len(text) > _MOST_DIGITS:
        return text
    if INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
