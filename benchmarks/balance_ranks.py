"""Encoder and text work dealt evenly to the ranks of a step: how long the slowest rank takes, before and after.

A skewed mixture: two thirds of the samples have a picture, of 16 to 2,048 patches, before 16 to 2,048 tokens of text,
both log-normal. Costs are fitted to measured times (CPU seconds of one thread) of other samples (`fit_costs`). Then the
samples of each rank are computed, forward and backward, one rank after the other in this process, as they came and as
`deal_samples` deals them; the pictures and the text of a rank are timed by themselves, since ranks wait for each other
after both. Given is the time of the slowest rank in that of the mean rank: 1.05 says that the mean rank waits 5 %.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from lengths import report, write
from torch import nn
from veomni_parallel import deal_samples, fit_costs

HIDDEN = 192


def build() -> nn.ModuleList:
    """An encoder and a decoder of four blocks each."""
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(HIDDEN, 4, 4 * HIDDEN, batch_first=True, dropout=0.0),
            4,
            enable_nested_tensor=False,
        )
        for _ in range(2)
    )


def mixture(samples: int, seed: int) -> np.ndarray:
    """[samples, 2] numbers of patches (0: no picture) and tokens."""
    rng = np.random.default_rng(seed)
    patches = np.clip(rng.lognormal(5.0, 0.9, samples), 16, 2048) * (rng.random(samples) < 2 / 3)
    return np.stack([patches, np.clip(rng.lognormal(5.5, 0.9, samples), 16, 2048)], 1).astype(int)


def seconds(module: nn.Module, lengths: list[int]) -> float:
    """CPU time of forward and backward of rows of these lengths, one after the other."""
    rows = [torch.randn(1, n, HIDDEN) for n in lengths if n]
    start = time.process_time()
    for row in rows:
        module(row).square().mean().backward()
    return time.process_time() - start


def amounts(lengths: np.ndarray) -> torch.Tensor:
    """[samples, 3]: what a sample costs by itself, by its length, and by its square; nothing where there is none."""
    lengths = torch.as_tensor(lengths, dtype=torch.float64)
    return torch.stack([(lengths > 0).double(), lengths, lengths.square()], 1)


def main() -> None:
    """Fit, deal, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16, help="of each rank")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = build()
    probes = mixture(60, seed=1000)
    fitted = []
    for kind, model in enumerate(models):
        seconds(model, [256] * 4)  # warm
        probed = probes[probes[:, kind] > 0, kind]
        fitted.append(fit_costs(amounts(probed), [seconds(model, [n]) for n in probed.tolist()]))
    shares: dict[str, list[list[float]]] = {"as they came": [], "dealt": []}
    for step in range(arguments.steps):
        lengths = mixture(arguments.ranks * arguments.samples, seed=step)
        costs = torch.stack([amounts(lengths[:, kind]) @ fitted[kind] for kind in range(2)], 1)
        counts = [arguments.samples] * arguments.ranks
        came = torch.arange(len(lengths)).view(arguments.ranks, -1).tolist()
        for way, dealt in (("as they came", came), ("dealt", deal_samples(costs, counts))):
            took = np.array([[seconds(m, lengths[own, k].tolist()) for k, m in enumerate(models)] for own in dealt])
            together = took.max(0).sum() / took.mean(0).sum()
            shares[way].append([*(took.max(0) / took.mean(0)).tolist(), float(together)])
    rows = []
    for way, found in shares.items():
        rows.append((way, *(f"{statistics.median(column):.3f}" for column in zip(*found, strict=True))))
    title = f"Slowest of {arguments.ranks} ranks, {arguments.samples} samples each, median of {arguments.steps} steps"
    report(title, ("samples", "pictures", "text", "step"), rows)
    write(arguments.json, shares)


if __name__ == "__main__":
    main()
