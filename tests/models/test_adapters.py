"""Adapters on a model that was made on meta, in one process; over ranks they are in tests/integration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel
from veomni_models import (
    ModelError,
    add_adapters,
    build_foundation_model,
    has_adapters,
    initialize_adapters,
    initialize_weights,
    merge_adapters,
    save_adapters,
    without_adapters,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
DENSE = {"model_type": "qwen3", **SIZES}
MOE = {"model_type": "qwen3_moe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (DENSE, {"r": 4}),
    (MOE, {"r": 4, "target_modules": ["q_proj"], "target_parameters": EXPERTS}),
]
IDS = torch.arange(10)[None]


def adapted(keys: dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    model = build_foundation_model(overrides=keys)
    add_adapters(model, options)
    with without_adapters(model):
        initialize_weights(model, 0, "cpu")
    initialize_adapters(model, 1, "cpu")
    return model


@pytest.mark.parametrize(("keys", "options"), OPTIONS, ids=["dense", "experts"])
def test_adapters_begin_without_effect_are_few_and_learn_alone(keys: dict[str, Any], options: dict[str, Any]) -> None:
    model = adapted(keys, options)
    plain = build_foundation_model(overrides=keys, init_device="cpu", seed=0)
    assert has_adapters(model)
    assert not has_adapters(plain)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert all((".lora_" in name) == p.requires_grad for name, p in model.named_parameters())
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if ".lora_A" in name)


@pytest.mark.parametrize(("keys", "options"), OPTIONS, ids=["dense", "experts"])
def test_peft_loads_what_is_saved_and_the_merged_model_has_the_same_logits(
    keys: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(keys, options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    expected = model(IDS).logits
    save_adapters(model, tmp_path, base="a/folder")
    plain = build_foundation_model(overrides=keys, init_device="cpu", seed=0)
    assert (plain(IDS).logits - expected).abs().max() > 0.1
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert loaded.peft_config["default"].base_model_name_or_path == "a/folder"
    torch.testing.assert_close(loaded(IDS).logits, expected)

    merge_adapters(model)
    with without_adapters(model):
        assert model.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"rank": 4}, "peft.LoraConfig has no rank"),
        ({"target_modules": ["q_prj"]}, "do not fit Qwen3ForCausalLM"),
        ({"r": 0}, "do not fit Qwen3ForCausalLM"),
        ({"use_dora": True}, "need whole weights"),
        ({"init_lora_weights": "pissa"}, "need whole weights"),
    ],
)
def test_what_peft_or_the_model_does_not_have_is_one_sentence(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ModelError, match=part):
        add_adapters(build_foundation_model(overrides=DENSE), options)
