"""What is better found out before the first step than after the last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from veomni_config import RecipeConfig
from veomni_data import DataError

_PROBES = 64


def check_rows(dataset: Sequence[Any], rows: Iterable[int]) -> None:
    """Read these rows once, so that a broken one raises its DataError now."""
    for row in rows:
        dataset[row]


def sizes_that_differ(dataset: Any, cfg: RecipeConfig) -> str:
    """A sentence if `data.train_size`, from which the steps follow, is far from the tokens of the data; else empty.

    The data's tokens are estimated from some samples, spread over all; broken ones count as none. Those of a
    stream are not known.
    """
    if not cfg.train.dyn_bsz or not isinstance(dataset, Sequence):
        return ""
    lengths = [_length(dataset, i) for i in range(0, len(dataset), -(-len(dataset) // _PROBES))]
    estimate = round(sum(lengths) / len(lengths) * len(dataset))
    if 0.7 <= estimate / cfg.data.train_size <= 1.4:
        return ""
    return (
        f"the data have about {estimate:,} tokens, but data.train_size={cfg.data.train_size:,} plans the steps and the "
        f"learning rate of an epoch: set it to the former"
    )


def _length(dataset: Sequence[Any], index: int) -> int:
    try:
        made = dataset[index]
    except DataError:
        return 0
    return sum(len(sample["input_ids"]) for sample in (made if isinstance(made, list) else [made]))
