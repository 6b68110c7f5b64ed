"""What the tests of the loader share: small data of which each sample can be told apart, and all ranks in a process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from veomni_data import build_dataloader

ROWS = 12  # divisible by 1, 2, 3 and 4 ranks


def samples(count: int = 300, longest: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Sample i is token i + 1, some times."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    return [{"input_ids": [i + 1] * n, "labels": [i + 1] * n} for i, n in enumerate(lengths)]


def loader(data: Any, rank: int = 0, ranks: int = 1, **kwargs: Any) -> Any:
    kwargs = {"micro_batch_size": 1, "global_batch_size": ROWS, "max_seq_len": 64, "buffer_size": 8, "seed": 3} | kwargs
    return build_dataloader(data, dp_rank=rank, dp_size=ranks, **kwargs)


def numbers(micro_batches: list[dict[str, Any]]) -> list[int]:
    """The samples of these micro-batches, in order."""
    found = []
    for batch in micro_batches:
        if "cu_seq_lens_q" in batch:
            starts = batch["input_ids"][0, batch["cu_seq_lens_q"][:-1]]
            found += [int(t) - 1 for t in starts if t]
            continue
        for row in batch["input_ids"]:
            found += [int(t) - 1 for t in torch.unique_consecutive(row) if t]
    return found


def together(data: Any, ranks: int, steps: int | None = None, states: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """The samples of each step that all ranks make, and the states after it; each rank must make the same steps."""
    loaders = [loader(data, rank, ranks, **kwargs) for rank in range(ranks)]
    for each in loaders if states else ():
        each.load_state_dict(states)
    iterators = [iter(each) for each in loaders]
    made: list[list[int]] = []
    while steps is None or len(made) < steps:
        parts = [next(iterator, None) for iterator in iterators]
        if None in parts:
            assert parts == [None] * ranks
            break
        made.append([number for part in parts for number in numbers(part)])
    return made, [each.state_dict() for each in loaders]


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that can be compared, without who made it."""
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "worker"}


def write_rows(path: Path, count: int, first: int = 0, longest: int = 40) -> str:
    """A file of rows whose samples are numbered from `first`."""
    lengths = [len(s["input_ids"]) for s in samples(count, longest)]
    path.write_text("".join(json.dumps({"number": first + i, "length": n}) + "\n" for i, n in enumerate(lengths)))
    return str(path)


def encode(row: Any) -> dict[str, Any]:
    ids = torch.full((row["length"],), row["number"] + 1)
    return {"input_ids": ids, "labels": ids}


def encode_pieces(row: Any) -> list[dict[str, Any]]:
    """Up to three samples of a row, of which the tokens differ; none of every fourth."""
    pieces = row["number"] % 4
    return [encode({"length": row["length"], "number": 3 * row["number"] + piece}) for piece in range(pieces)]
