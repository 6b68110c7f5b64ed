"""The loss without logits over ranks: loss and every gradient are those of one process, sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import Ranks
from veomni_models import use_fused_loss

from tests.parallel.parity import assert_true, build, samples, step_of, truth

LAYOUTS: dict[str, tuple[dict[str, int], str]] = {
    "fsdp2": ({}, "fsdp2"),
    "ddp": ({}, "ddp"),
    "ulysses": ({"ulysses": 2}, "fsdp2"),
}


def fused_step(name: str, sizes: dict[str, int], mode: str) -> dict[str, Any]:
    model = build(name)
    use_fused_loss(model)
    return step_of(model, samples(), sizes, {"mode": mode})


@pytest.mark.parametrize("name", ["qwen3", "mistral"])  # a head that is the embedding, and one of its own
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fused_loss_over_ranks_is_that_of_one_process(name: str, layout: str, two_ranks: Ranks) -> None:
    assert_true(truth(name), two_ranks.run(fused_step, name, *LAYOUTS[layout], timeout=110))
