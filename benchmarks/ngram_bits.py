"""Bits per byte of n-gram models of bytes on held-out texts: what a trained model is compared with.

    python benchmarks/ngram_bits.py data/fortunes [--order 5]

The folder has `train.jsonl`, `validation.jsonl` and `test.jsonl` with lines of `{"text": ...}`. All bytes of a text and
its end are predicted, from the bytes before them back to its start. Smoothing is interpolated modified Kneser-Ney (Chen
and Goodman, Computer Speech & Language 13, 1999, with discounts from the counts of counts, times a factor) or
Witten-Bell; the validation texts choose between them, and the factor.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

BASE = 258  # 256 bytes, the end of a text, and what stands before its start
END, START = 256, 257


class Order(NamedTuple):
    """The n-grams of one length: int64 codes, sorted, with counts; and of each context the total and n-gram types.

    `kinds` [contexts, 3] counts the types seen once, twice and more often.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray


def symbols(texts: list[str], order: int) -> tuple[np.ndarray, np.ndarray]:
    """All texts behind each other, each after `order` - 1 start symbols; and which symbols are predicted."""
    parts, predicted = [], []
    for text in texts:
        data = np.frombuffer(text.encode(), dtype=np.uint8)
        parts += [np.full(order - 1, START), data, [END]]
        predicted += [np.zeros(order - 1, bool), np.ones(len(data) + 1, bool)]
    return np.concatenate(parts).astype(np.int64), np.concatenate(predicted)


def codes(stream: np.ndarray, predicted: np.ndarray, length: int) -> np.ndarray:
    """The n-gram that ends at each predicted symbol, as a number in base 258."""
    places = np.flatnonzero(predicted)
    code = np.zeros(len(places), np.int64)
    for back in range(length - 1, -1, -1):
        code = code * BASE + stream[np.maximum(places - back, 0)]
    return code


def count(stream: np.ndarray, predicted: np.ndarray, order: int, kneser_ney: bool) -> list[Order]:
    """The orders 1 to `order`; with `kneser_ney` lower ones count what they stand behind, if not a text's start."""
    raw = [np.unique(codes(stream, predicted, n), return_counts=True) for n in range(1, order + 1)]
    orders = []
    for n, (grams, counts) in enumerate(raw, 1):
        if kneser_ney and n < order:
            suffixes, types = np.unique(raw[n][0] % BASE**n, return_counts=True)
            assert np.array_equal(suffixes, grams)
            counts = np.where((grams // BASE ** (n - 1) == START) & (n > 1), counts, types)
        contexts, first = np.unique(grams // BASE, return_index=True)
        kinds = np.stack([counts == 1, counts == 2, counts >= 3], 1)
        orders.append(
            Order(grams, counts, contexts, np.add.reduceat(counts, first), np.add.reduceat(kinds, first).astype(float))
        )
    return orders


def discounts(counts: np.ndarray) -> np.ndarray:
    """[3]: of n-grams seen once, twice and more often (Chen and Goodman, equation 26)."""
    n1, n2, n3, n4 = (max(1, int((counts == i).sum())) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    return np.clip([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0.01, [0.99, 1.99, 2.99])


def find(table: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each code stands in a sorted table, and whether it does."""
    places = np.minimum(np.searchsorted(table, codes), len(table) - 1)
    return places, table[places] == codes


def probabilities(orders: list[Order], stream: np.ndarray, predicted: np.ndarray, factor: float | None) -> np.ndarray:
    """Of each predicted symbol; with `factor` of the discounts of Kneser-Ney, with None Witten-Bell."""
    lower = np.full(int(predicted.sum()), 1 / (BASE - 1))
    for n, order in enumerate(orders, 1):
        code = codes(stream, predicted, n)
        place, seen = find(order.grams, code)
        context, known = find(order.contexts, code // BASE)
        counts = np.where(seen, order.counts[place], 0)
        totals, kinds = order.totals[context], order.kinds[context]
        if factor is None:
            types = kinds.sum(1)
            p = (counts + types * lower) / (totals + types)
        else:
            off = factor * discounts(order.counts)
            own = np.maximum(counts - np.array([0, *off])[np.minimum(counts, 3)], 0)
            p = (own + (kinds @ off) * lower) / totals
        lower = np.where(known, p, lower)
    return lower


def main() -> None:
    """Choose on the validation texts, and print the bits per byte of the test texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--order", type=int, default=5, choices=range(1, 8), help="of longer ones 64 bits are too few")
    args = parser.parse_args()
    began = time.process_time()
    texts = {
        name: [json.loads(line)["text"] for line in (args.folder / f"{name}.jsonl").open(encoding="utf-8")]
        for name in ("train", "validation", "test")
    }
    streams = {name: symbols(part, args.order) for name, part in texts.items()}
    size = {name: sum(len(text.encode()) for text in part) for name, part in texts.items()}
    models = {True: count(*streams["train"], args.order, True), False: count(*streams["train"], args.order, False)}

    def bits(name: str, factor: float | None) -> float:
        found = probabilities(models[factor is not None], *streams[name], factor)
        return float(-np.log2(found).sum() / size[name])

    tried = {factor: bits("validation", factor) for factor in (None, 0.8, 0.9, 1.0, 1.05, 1.1)}
    best = min(tried, key=lambda factor: tried[factor])
    for factor, value in tried.items():
        kind = "Witten-Bell" if factor is None else f"Kneser-Ney, discounts x {factor}"
        print(f"{args.order}-gram, {kind}: {value:.4f} bits per byte of validation")
    print(f"chosen: {bits('test', best):.4f} bits per byte of test; {time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main()
