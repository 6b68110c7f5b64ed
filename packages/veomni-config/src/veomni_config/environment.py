"""`${env:NAME}` and `${env:NAME:-default}`; `$${` stands for the two characters themselves."""

from __future__ import annotations

import os
import re

_REFERENCE = re.compile(r"\$\$\{|\$\{(env:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(:-(?P<default>[^}]*))?\}|(?P<other>\w+)?)")
_NESTED = re.compile(r"(?<!\$)\$\{env:[A-Za-z_][A-Za-z0-9_]*:-[^}]*\$\{")


def substitute_environment(text: str) -> tuple[str, str | None]:
    """`text` with its environment references filled in, and what is wrong with them (None when nothing is).

    What a variable holds is not looked into again. A variable that is set but empty counts as unset where a default
    is given, as in a shell.
    """
    if _NESTED.search(text):
        return text, f"{text!r} holds a reference within a reference: a default is plain text, without ${{"
    problems = []

    def fill(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match["name"], match["default"]
        if name is None:
            other = match["other"]
            right = f"${{env:{other if other and other != 'env' else 'NAME'}}}"
            problems.append(f"{text!r} holds '${{' without a reference: write {right}, or $${{ for the characters")
            return match[0]
        value = os.environ.get(name)
        if default is not None:
            return value or default
        if value is None:
            problems.append(
                f"the environment variable {name} is not set: set it, or give a default by ${{env:{name}:-default}}"
            )
        return value or ""

    filled = _REFERENCE.sub(fill, text)
    return filled, "; ".join(dict.fromkeys(problems)) or None


def escape_environment(text: str) -> str:
    """`text` so that `substitute_environment` gives it back."""
    return text.replace("${", "$${")
