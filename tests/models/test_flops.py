"""Counted operations of real steps, by torch's counter, are those of the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from veomni_models import flops_per_step, mfu
from veomni_models.flops import _pairs, sample_lengths
from veomni_models.foundation import auto_class_for

from tests.architectures import tiny_config
from tests.models.drawing_parts import DECODERS, pack, samples
from tests.models.drawing_parts import build as build_drawing
from tests.parallel.multimodal import build_multimodal, multimodal_samples, pack_multimodal

DENSE = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text", "gpt2")
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe")
MULTIMODAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni", "gemma3")


def build(name: str) -> nn.Module:
    config = tiny_config(name)
    torch.manual_seed(0)
    model = auto_class_for(config).from_config(config, dtype=torch.float32, attn_implementation="eager")
    return countable(model)


def countable(model: nn.Module) -> nn.Module:
    """With experts one after the other: the counter knows no grouped products."""
    if any(hasattr(module, "is_transposed") for module in model.modules()):
        model.set_experts_implementation("eager")
    return model


def counted(model: nn.Module, **batch: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch).logits.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [*DENSE, *MIXTURES])
def test_text_models_are_within_two_percent_of_the_counter(name: str) -> None:
    model, ids = build(name), torch.randint(6, 60, (1, 50), generator=torch.Generator().manual_seed(0))
    expected = counted(model, input_ids=ids)
    assert flops_per_step(model, {"input_ids": ids}, causal=False) == pytest.approx(expected, rel=0.02)
    assert flops_per_step(model.config, {"input_ids": ids}) == flops_per_step(model, {"input_ids": ids})


@pytest.mark.parametrize("name", MULTIMODAL)
def test_models_with_towers_are_within_two_percent_of_the_counter(name: str) -> None:
    model = countable(build_multimodal(name))
    model.set_attn_implementation("eager")
    batch = pack_multimodal(multimodal_samples(name)[:1])
    inputs = {k: v for k, v in batch.items() if k != "shift_labels" and not k.startswith(("cu_", "max_"))}
    assert flops_per_step(model, batch, causal=False) == pytest.approx(counted(model, **inputs), rel=0.02)


@pytest.mark.parametrize("part", ["all", "decoder", "head"])
def test_frozen_parts_cost_their_forward(part: str) -> None:
    model, ids = build("qwen3_moe"), torch.arange(6, 56)[None]
    model.requires_grad_(False)
    {"all": model, "decoder": model.model.layers[1:], "head": model.lm_head}[part].requires_grad_(True)
    if part == "decoder":
        model.model.layers.requires_grad_(True)
    assert flops_per_step(model, {"input_ids": ids}, causal=False) == pytest.approx(
        counted(model, input_ids=ids), rel=0.02
    )


@pytest.mark.parametrize("way", DECODERS)
def test_what_draws_is_left_out(way: str) -> None:
    model, row = build_drawing(way), pack(samples())
    with_decoder = flops_per_step(model, row)
    model.decoders.clear()
    assert flops_per_step(model, row) == with_decoder


def test_recomputation_adds_a_forward() -> None:
    model, ids = build("llama"), torch.arange(6, 56)[None]
    once = flops_per_step(model, {"input_ids": ids}, causal=False)
    model.gradient_checkpointing_enable()  # which leaves out the last product of a layer: nothing needs its result
    expected = counted(model.train(), input_ids=ids)
    assert flops_per_step(model, {"input_ids": ids}, causal=False, recompute=True) == pytest.approx(expected, rel=0.05)
    assert expected > 1.25 * once


@pytest.mark.parametrize("window", [None, 1, 4, 7, 50, -4, -7])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    q, k = torch.arange(23)[:, None], torch.arange(23)[None]
    seen = k <= q
    if window is not None:
        seen &= (q - k < window) if window > 0 else (q // -window == k // -window)
    assert _pairs(23, window, causal=True) == int(seen.sum())


def test_samples_of_a_row_do_not_attend_to_each_other() -> None:
    ids = torch.arange(6, 36)[None]
    ends = torch.tensor([0, 10, 30], dtype=torch.int32)
    assert sample_lengths({"input_ids": ids, "cu_seq_lens_q": ends}) == [10, 20]
    assert sample_lengths(
        {"input_ids": ids, "position_ids": torch.cat([torch.arange(10), torch.arange(20)])[None]}
    ) == [10, 20]
    assert sample_lengths({"input_ids": ids.view(3, 10), "attention_mask": torch.ones(3, 10).tril()}) == [1, 2, 3]
    model = build("qwen3")
    row, first, second = (
        flops_per_step(model, {"input_ids": part, **more})
        for part, more in ((ids, {"cu_seq_lens_q": ends}), (ids[:, :10], {}), (ids[:, 10:], {}))
    )
    assert row == first + second


def test_mfu_is_the_share_of_the_peak() -> None:
    assert mfu(989e12, 2.0, 1, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert mfu(756e12, 1.0, 1, "NVIDIA H100 PCIe") == pytest.approx(1.0)
    assert mfu(1e12, 1.0, 1, "a laptop's CPU") is None
