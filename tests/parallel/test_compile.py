"""Compiled blocks compute what eager ones do."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import Ranks
from veomni_parallel import build_parallelize_model, init_parallel_state

from tests.parallel.mixtures import build, step, truth
from tests.parallel.parity import assert_true

AOT = {"backend": "aot_eager"}


def compiled(name: str, sizes: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    result = step(name, sizes, options)
    return result | {"graphs": counters["stats"]["unique_graphs"]}


def test_compiled_blocks_have_the_gradients_of_one_process(two_ranks: Ranks) -> None:
    options = {"compile": AOT, "activation_checkpointing": "full", "plan": {"experts": ["mixtures.*"]}}
    results = two_ranks.run(compiled, "stranger", {"ep": 2}, options)
    assert_true(truth("stranger"), results)
    assert all(result["graphs"] >= 1 for result in results), "nothing was compiled"


def test_selecting_operators_of_compiled_blocks_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"selective checkpointing cannot keep some: use activation_checkpointing=.full"
    ):
        build_parallelize_model(
            build("llama"),
            init_parallel_state(device_type="cpu"),
            compile=True,
            activation_checkpointing="selective",
        )


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", [None, "full"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("llama", {}), ("llama", {"ulysses": 2}), ("qwen3", {"tp": 2}), ("qwen3_moe", {"ep": 2})],
    ids=str,
)
@pytest.mark.parametrize("compile", [AOT, True], ids=["aot_eager", "inductor"])
def test_whatever_compiles_and_is_recomputed_the_gradients_are_the_same(
    compile: Any, name: str, sizes: dict[str, int], activation_checkpointing: Any, two_ranks: Ranks
) -> None:
    options = {"compile": compile, "activation_checkpointing": activation_checkpointing}
    results = two_ranks.run(compiled, name, sizes, options, timeout=110)
    assert_true(truth(name), results)
    assert all(result["graphs"] >= 1 for result in results), "nothing was compiled"
