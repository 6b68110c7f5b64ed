"""What is wrong with a configuration, and where it was written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: a line of a file (counted from 1), or the command line (`file` empty)."""

    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "command line"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `key` is dotted (`train.lr`), `text` says what is given and what would be right."""

    key: str
    text: str
    origin: Origin | None = None

    def __str__(self) -> str:
        key = f"--{self.key}" if self.origin and not self.origin.file and self.key else self.key
        line = ": ".join(part for part in (str(self.origin or ""), key, self.text) if part)
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)  # one line, safe to print


class ConfigError(ValueError):
    """A configuration that cannot be used. The message has one line for each of `problems`."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        return ConfigError, (self.problems,)
