"""Ranks with different tokens draw differently, ranks with the same tokens alike."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from veomni_parallel import init_parallel_state, seed_ranks


def drawn(sizes: dict[str, int], seed: int) -> tuple[int, list[float]]:
    own = seed_ranks(seed, init_parallel_state(**sizes, device_type="cpu"))
    return own, torch.nn.functional.dropout(torch.ones(16), 0.5).tolist()


@pytest.mark.parametrize(
    ("sizes", "different"),
    [({}, 4), ({"ulysses": 4}, 4), ({"ulysses": 2}, 4), ({"tp": 2}, 2), ({"tp": 4}, 1), ({"tp": 2, "ulysses": 2}, 2)],
    ids=str,
)
def test_who_draws_alike(sizes: dict[str, int], different: int, four_ranks: Ranks) -> None:
    first = four_ranks.run(drawn, sizes, 1)
    assert len({own for own, _ in first}) == len({tuple(numbers) for _, numbers in first}) == different
    assert four_ranks.run(drawn, sizes, 1) == first, "not the same in the next run"
    assert not {own for own, _ in four_ranks.run(drawn, sizes, 2)} & {own for own, _ in first}


def test_one_process_draws_as_the_first_of_many(two_ranks: Ranks) -> None:
    assert drawn({}, 7) == two_ranks.run(drawn, {}, 7)[0]
