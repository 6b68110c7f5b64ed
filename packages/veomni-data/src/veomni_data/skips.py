"""Broken examples: each is written down where it is met, and a run with too many of them stops."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .rows import Fault
from .source import Source

_JUDGED_FROM = 1000  # examples: of fewer, one broken one would be more than 1 %


def too_many(skipped: int, seen: int, max_skipped: float, rows: int | None) -> bool:
    """Whether so many broken examples are to stop the run.

    Args:
        skipped, seen: examples so far, over all ranks.
        max_skipped: the share that may be broken. It is a share of at least 1,000 examples, or of the whole epoch if
            that has fewer, so that a run does not stop for the first.
        rows: of an epoch, if known.
    """
    least = _JUDGED_FROM if rows is None else min(rows, _JUDGED_FROM)
    return skipped > max_skipped * max(seen, least)


def write_skips(path: Path, faults: Iterable[Fault], sources: Sequence[Source], *, epoch: int, step: int) -> None:
    """Append a line of JSON for each; several processes may write to one file."""
    lines = []
    for fault in faults:
        source = sources[fault.source]
        line: dict[str, Any] = {"reason": fault.reason, "source": source.name, "place": source.place(fault.ref)}
        line |= {"ref": fault.ref, "epoch": epoch, "step": step, "message": fault.message}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        for text in lines:  # one write each: a short one to a file opened for appending is not torn
            os.write(file, text.encode("utf-8", "replace"))
    finally:
        os.close(file)


def skips_sentence(reasons: Counter[str], seen: int, max_skipped: float, last: str | None, path: Path | None) -> str:
    """Why the run stops."""
    skipped = sum(reasons.values())
    counted = ", ".join(f"{reason} {number:,}" for reason, number in reasons.most_common())
    sentence = (
        f"{skipped:,} of the first {seen:,} examples are broken ({counted}), more than max_skipped={max_skipped:.3g}"
    )
    if path is not None:
        sentence += f"; each is named in {path}"
    return sentence + (f"; the last: {last}" if last else "")
