"""Rows of a token budget: how full they are, and how fast they are made.

Whole lists: `pack` and, if it is installed, TRL's `pack_dataset(strategy="bfd")`. Streams: `PackingBuffer` and a buffer
that is searched from its oldest sample on, as common training systems do it. All take turns in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from lengths import CAPACITY, bimodal, log_normal, medians, report, uniform, write
from veomni_data import PackingBuffer, pack


def trl_rows(dataset: Any) -> list[list[int]]:
    """The lengths of the samples of each row that TRL makes."""
    from trl import pack_dataset

    return pack_dataset(dataset, CAPACITY, strategy="bfd")["seq_lengths"]


def trl_dataset(lengths: list[int]) -> Any:
    """The samples as TRL takes them; None if it is not installed."""
    try:
        import trl  # noqa: F401
    except ImportError:
        return None
    from datasets import Dataset, disable_caching, disable_progress_bars

    disable_caching()
    disable_progress_bars()
    return Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})


def pack_lengths(lengths: list[int]) -> list[list[int]]:
    """The lengths of the samples of each row of `pack`."""
    return [[lengths[i] for i in row] for row in pack(lengths, CAPACITY)]


class FirstFitBuffer:
    """Holds samples until there are over `buffer_size` and they fill a row; takes each that fits, oldest first."""

    def __init__(self, buffer_size: int) -> None:
        self.buffer_size = buffer_size
        self._held: list[tuple[int, int]] = []
        self._tokens = 0

    def put(self, sample: tuple[int, int]) -> list[tuple[int, int]] | None:
        """Take in a sample; a row if one is ready."""
        self._held.append(sample)
        self._tokens += sample[1]
        if len(self._held) <= self.buffer_size or self._tokens < CAPACITY:
            return None
        row, rest, room = [], [], CAPACITY
        for held in self._held:
            if held[1] <= room:
                row.append(held)
                room -= held[1]
            else:
                rest.append(held)
        self._held = rest
        self._tokens -= CAPACITY - room
        return row


def stream(make: Callable[[], Any], samples: list[tuple[int, int]]) -> list[tuple[int, list[tuple[int, int]]]]:
    """The rows of a stream, each with how many samples had come in when it was given."""
    buffer, rows = make(), []
    for count, sample in enumerate(samples, 1):
        row = buffer.put(sample)
        if row is not None:
            rows.append((count, row))
    return rows


def main() -> None:
    """Measure, print the tables, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    figures: dict[str, Any] = {"whole": {}, "stream": {}}
    table = []
    for kind, draw in (("log-normal", log_normal), ("uniform", uniform), ("bimodal", bimodal)):
        lengths = draw(args.samples)
        dataset = trl_dataset(lengths)
        contenders = {"pack": partial(pack, lengths, CAPACITY)}
        if dataset is not None:
            contenders["TRL bfd"] = partial(trl_rows, dataset)
        seconds, rows = medians(contenders, args.repeats)
        bound = -(-sum(lengths) // CAPACITY)
        for name in contenders:
            fullness = bound / len(rows[name])
            speed = len(lengths) / seconds[name]
            figures["whole"][f"{kind}, {name}"] = {"of_lower_bound": fullness, "samples_per_second": speed}
            table.append([kind, name, f"{fullness:.3%}", f"{speed:,.0f}"])
    report(
        f"Whole list, {args.samples:,} samples, rows of {CAPACITY:,}",
        ["lengths", "", "of the lower bound", "samples/s"],
        table,
    )

    table = []
    for kind, draw in (("log-normal", log_normal), ("uniform", uniform)):
        samples = list(enumerate(draw(args.samples)))
        for size in (200, 1000):
            contenders = {
                "PackingBuffer": partial(stream, partial(PackingBuffer, CAPACITY, size, length=itemgetter(1)), samples),
                "first fit, oldest first": partial(stream, partial(FirstFitBuffer, size), samples),
            }
            seconds, rows = medians(contenders, args.repeats)
            for name in contenders:
                given = rows[name]
                fullness = sum(length for _, row in given for _, length in row) / (CAPACITY * len(given))
                wait = max(count - 1 - arrival for count, row in given for arrival, _ in row) / size
                speed = len(samples) / seconds[name]
                figures["stream"][f"{kind}, {size}, {name}"] = {
                    "fullness": fullness,
                    "samples_per_second": speed,
                    "longest_wait_in_buffers": wait,
                }
                table.append([kind, f"{size:,}", name, f"{fullness:.3%}", f"{speed:,.0f}", f"{wait:.1f} buffers"])
    report(
        "Stream, without the rows that the end leaves",
        ["lengths", "buffer", "", "full", "samples/s", "longest wait"],
        table,
    )
    write(args.json, figures)


if __name__ == "__main__":
    main()
