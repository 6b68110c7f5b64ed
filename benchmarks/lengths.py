"""The lengths that the packing benchmarks share, and how they time and report."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CAPACITY = 8192


def log_normal(count: int, mean: float = 500.0, sigma: float = 1.0, seed: int = 0) -> list[int]:
    """Lengths as those of documents and conversations are: many short, few long."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(draws, 1, CAPACITY).astype(int).tolist()


def uniform(count: int, seed: int = 0) -> list[int]:
    """Every length equally often."""
    return np.random.default_rng(seed).integers(1, CAPACITY + 1, count).tolist()


def bimodal(count: int, seed: int = 0) -> list[int]:
    """Nine short ones of 20 to 300 for each long one of 4,000 to 8,192."""
    rng = np.random.default_rng(seed)
    short, long = rng.integers(20, 301, count), rng.integers(4000, CAPACITY + 1, count)
    return np.where(rng.random(count) < 0.9, short, long).tolist()


def medians(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of each contender, the median of `repeats` rounds in which all take turns; and what each gave last."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, contender in contenders.items():
            start = time.perf_counter()
            results[name] = contender()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {"python": platform.python_version(), "cpu": models[0] if models else platform.processor()}


def report(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def write(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures, with the machine, as JSON."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")
        print(f"\nwritten to {path}")
