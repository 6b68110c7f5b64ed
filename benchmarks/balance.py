"""Equal work on every rank: how much longer a step takes than if its work were spread evenly, and how full rows are.

The work of a sample of L tokens is L + L^2 / K. K = 6 H is that of a model of width H without a causal kernel (12 H
with one, which is more even); K = 1 is all but squares alone, which is harder than any model. `rows` rows a rank make a
step of 8 ranks. Over the whole epoch, end included:

- time: the sum over all steps of the slowest rank's work, over the sum of the mean rank's (1 = no rank ever waits);
- steps over 1.05: those in which the slowest rank has more than 1.05 times the mean work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lengths import CAPACITY, log_normal, report, write
from veomni_data import BalancedBuffer, PackingBuffer, deal_rows, pack, step_target

Rows = list[list[int]]  # indices of samples


def stream(lengths: Sequence[int], costs: Sequence[float], rows: int, buffer_size: int, balanced: bool) -> list[Rows]:
    """The rows of each step, one from each buffer, until a buffer has no more."""
    buffers: list[Any] = [
        BalancedBuffer(CAPACITY, buffer_size, length=lengths.__getitem__, cost=costs.__getitem__)
        if balanced
        else PackingBuffer(CAPACITY, buffer_size, length=lengths.__getitem__)
        for _ in range(rows)
    ]
    parts = [iter(range(number, len(lengths), rows)) for number in range(rows)]
    steps: list[Rows] = []
    while True:
        more = {"target": step_target([buffer.outlook() for buffer in buffers])} if balanced else {}
        step = []
        for buffer, part in zip(buffers, parts, strict=True):
            row = next((row for i in part if (row := buffer.put(i, **more)) is not None), None)
            step.append(row if row is not None else buffer.pop_row(**more))
        if any(row is None for row in step):
            return steps
        steps.append(step)


def in_turn(rows: Rows, size: int, shuffle: bool) -> list[Rows]:
    """Consecutive rows as steps."""
    if shuffle:
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    return [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]


def as_they_come(costs: Sequence[float], ranks: int, each: int) -> Rows:
    """The first rows to the first rank."""
    return np.arange(ranks * each).reshape(ranks, each).tolist()


def main() -> None:
    """Measure, print the tables, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8], help="rows of a rank in a step")
    parser.add_argument("--buffer-size", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lengths = log_normal(args.samples)
    works = {"6 x 1,024": 6 * 1024, "6 x 2,048": 6 * 2048, "6 x 4,096": 6 * 4096, "6 x 8,192": 6 * 8192}
    works |= {"8,192": CAPACITY, "1": 1}

    figures: dict[str, Any] = {}
    table = []
    plain: dict[tuple[str, int], list[Rows]] = {}
    for name, divisor in works.items():
        costs = [n + n * n / divisor for n in lengths]
        balanced_list = pack(lengths, CAPACITY, costs=costs)
        for each in args.rows:
            size = each * args.ranks
            if ("stream", each) not in plain:
                plain["stream", each] = stream(lengths, costs, size, args.buffer_size, balanced=False)
                plain["list", each] = in_turn(pack(lengths, CAPACITY), size, shuffle=True)
            start = time.perf_counter()
            balanced = stream(lengths, costs, size, args.buffer_size, balanced=True)
            speed = len(lengths) / (time.perf_counter() - start)
            ways: dict[str, tuple[list[Rows], Callable[..., Rows]]] = {
                "stream, not balanced": (plain["stream", each], as_they_come),
                "stream, rows dealt": (plain["stream", each], deal_rows),
                "stream, balanced": (balanced, deal_rows),
                "list, not balanced": (plain["list", each], as_they_come),
                "list, balanced": (in_turn(balanced_list, size, shuffle=False), deal_rows),
            }
            for way, (steps, deal) in ways.items():
                if way == "stream, rows dealt" and each == 1:
                    continue
                of_ranks, tokens = [], []
                for step in steps:
                    of_rows = [sum(costs[i] for i in row) for row in step]
                    of_ranks.append([sum(of_rows[i] for i in own) for own in deal(of_rows, args.ranks, each)])
                    tokens += [sum(lengths[i] for i in row) for row in step]
                ranks = np.array(of_ranks)
                ratio = ranks.max(1) / ranks.mean(1)
                figure = {
                    "time": float(ranks.max(1).sum() / ranks.mean(1).sum()),
                    "median_step": float(np.median(ratio)),
                    "worst_step": float(ratio.max()),
                    "steps_over_1.05": float((ratio > 1.05).mean()),
                    "fullness": float(np.mean(tokens) / CAPACITY),
                }
                if way == "stream, balanced":
                    figure["samples_per_second"] = speed
                figures[f"K = {name}, {each} rows, {way}"] = figure
                cells = [f"{figure[key]:.3f}" for key in ("time", "median_step", "worst_step")]
                percent = [f"{figure['steps_over_1.05']:.1%}", f"{figure['fullness']:.2%}"]
                table.append([name, str(each), way, *cells, *percent, str(len(steps))])
    title = (
        f"{args.samples:,} log-normal lengths, rows of {CAPACITY:,}, {args.ranks} ranks, buffers of {args.buffer_size}"
    )
    header = ["K", "rows", "", "time", "median step", "worst step", "steps over 1.05", "full", "steps"]
    report(title, header, table)
    write(args.json, figures)


if __name__ == "__main__":
    main()
