"""What became of the examples of a run, counted for each virtual shard so that it survives another number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Counts:
    """Since the beginning of the run.

    Attributes:
        seen: examples that were taken in, those that were skipped too.
        samples, tokens: in the rows that were given, of each source.
        skipped: broken examples of each source, by reason.
        dropped, truncated, split: examples longer than a row, by what became of them.
    """

    seen: int = 0
    samples: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, dict[str, int]] = field(default_factory=dict)
    dropped: int = 0
    truncated: int = 0
    split: int = 0

    @property
    def skips(self) -> int:
        """Broken examples of all sources."""
        return sum(sum(reasons.values()) for reasons in self.skipped.values())

    def give(self, source: int, tokens: int) -> None:
        """Count a sample of a row that was given."""
        self.samples[source] = self.samples.get(source, 0) + 1
        self.tokens[source] = self.tokens.get(source, 0) + tokens

    def skip(self, source: int, reason: str) -> None:
        """Count a broken example."""
        reasons = self.skipped.setdefault(source, {})
        reasons[reason] = reasons.get(reason, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """What is not zero, JSON-able."""
        values = asdict(self)
        for key in ("samples", "tokens", "skipped"):  # JSON has no numbers for keys
            values[key] = [[source, values[key][source]] for source in sorted(values[key])]
        return {key: value for key, value in values.items() if value}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Counts:
        """What `state_dict` gave."""
        pairs = {key: dict(state.get(key, ())) for key in ("samples", "tokens")}
        skipped = {source: dict(reasons) for source, reasons in state.get("skipped", ())}
        return cls(**{**state, **pairs, "skipped": skipped})


def total_counts(counts: Iterable[Counts], names: Sequence[str]) -> dict[str, Any]:
    """The sum over shards, with the names of the sources."""
    total: dict[str, Any] = {"seen": 0, "dropped": 0, "truncated": 0, "split": 0}
    for key in ("samples", "tokens"):
        total[key] = dict.fromkeys(names, 0)
    skipped: dict[str, Counter[str]] = {name: Counter() for name in names}
    for each in counts:
        for key in ("seen", "dropped", "truncated", "split"):
            total[key] += getattr(each, key)
        for key in ("samples", "tokens"):
            for source, number in getattr(each, key).items():
                total[key][names[source]] += number
        for source, reasons in each.skipped.items():
            skipped[names[source]].update(reasons)
    return total | {"skipped": {name: dict(reasons) for name, reasons in skipped.items()}}
