"""Loss and every gradient of a step are those of one process that runs each sample alone."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import Ranks

from tests.parallel.parity import assert_true, step, truth

LAYOUTS: dict[str, tuple[int, dict[str, int], str]] = {
    "ddp 2": (2, {}, "ddp"),
    "fsdp1 2": (2, {}, "fsdp1"),
    "fsdp2 2": (2, {}, "fsdp2"),
    "hsdp 2x2": (4, {"dp_replicate": 2}, "fsdp2"),
    "fsdp1 hsdp 2x2": (4, {"dp_replicate": 2}, "fsdp1"),
    "ulysses 2": (2, {"ulysses": 2}, "fsdp2"),
    "ulysses 4, more ranks than key heads": (4, {"ulysses": 4}, "fsdp2"),
    "dp 2 x ulysses 2": (4, {"ulysses": 2}, "fsdp2"),
    "ddp, ulysses 2": (2, {"ulysses": 2}, "ddp"),
    "fsdp1, ulysses 2": (2, {"ulysses": 2}, "fsdp1"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "stranger"])
def test_any_layout_has_the_loss_gradients_and_norm_of_one_process(
    name: str, layout: str, two_ranks: Ranks, four_ranks: Ranks
) -> None:
    world, sizes, mode = LAYOUTS[layout]
    ranks = two_ranks if world == 2 else four_ranks
    assert_true(truth(name), ranks.run(step, name, sizes, {"mode": mode}))


@pytest.mark.parametrize(
    ("sizes", "mode"), [({}, "fsdp2"), ({}, "ddp"), ({"ulysses": 2}, "fsdp2"), ({"ulysses": 2}, "ddp")]
)
def test_a_tower_beside_the_decoder_keeps_its_gradients(sizes: dict[str, int], mode: str, two_ranks: Ranks) -> None:
    assert_true(truth("omni"), two_ranks.run(step, "omni", sizes, {"mode": mode}))


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_reducing_only_the_last_micro_batch_changes_nothing(mode: str, two_ranks: Ranks) -> None:
    assert_true(truth("qwen3"), two_ranks.run(step, "qwen3", {}, {"mode": mode}, True))


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("sizes", [{}, {"ulysses": 2}])
def test_recomputing_activations_changes_nothing(mode: str, sizes: dict[str, int], two_ranks: Ranks) -> None:
    options = {"mode": mode, "activation_checkpointing": "full"}
    assert_true(truth("llama"), two_ranks.run(step, "llama", sizes, options))


@pytest.mark.parametrize(
    "options",
    [
        {"reshard_after_forward": False, "forward_prefetch": False},
        {"reshard_after_forward": False, "forward_prefetch": False, "mode": "fsdp1"},
        {"plan": {"shard_units": ["LlamaMLP"], "no_shard": ["model.layers.*.self_attn", "model.norm"]}},
    ],
    ids=str,
)
def test_how_a_model_is_cut_changes_nothing(options: dict[str, Any], two_ranks: Ranks) -> None:
    assert_true(truth("llama"), two_ranks.run(step, "llama", {}, options))


def test_replicas_alone_are_data_parallel_too(two_ranks: Ranks) -> None:
    assert_true(truth("llama"), two_ranks.run(step, "llama", {"dp_replicate": 2}, {}))


def test_one_process_without_a_group_runs_the_same_lines() -> None:
    result = step("llama", {}, {})
    assert result["wrapper"] == "LlamaForCausalLM"
    assert_true(truth("llama"), [result])
