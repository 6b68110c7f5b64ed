"""Options of foundation models: what computes experts; processors from a folder; buffers after meta initialisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from veomni_models import ModelError, build_foundation_model, build_omni_model, build_processor, initialize_weights
from veomni_models.foundation import auto_class_for

from tests.architectures import tiny_config

from .test_initialization import PARTS


@pytest.mark.parametrize(
    ("given", "expected"),
    [("auto", "grouped_mm"), (None, "grouped_mm"), ("fused", "grouped_mm"), ("eager", "eager"), ("batched_mm",) * 2],
)
def test_who_computes_experts(given: str | None, expected: str) -> None:
    model = build_foundation_model(tiny_config("qwen3_moe"), moe_implementation=given)
    assert model.config._experts_implementation == expected
    assert build_foundation_model(tiny_config("qwen3"), moe_implementation=given) is not None


def test_unknown_experts_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"moe_implementation 'gruoped_mm' is not registered .*, did you mean grouped_mm\?"
    ):
        build_foundation_model(tiny_config("qwen3_moe"), moe_implementation="gruoped_mm")


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        build_processor(tmp_path / "absent")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no processor that can be loaded"):
        build_processor(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt_oss", "gemma3_text", "qwen3_next", "qwen2_5_vl", "qwen3_omni_moe_thinker", "apertus", "gpt_neox"],
)
def test_buffers_that_are_not_saved_are_right_after_meta_initialisation(name: str) -> None:
    model = build_foundation_model(tiny_config(name))
    initialize_weights(model, seed=0, device="cpu")
    config = tiny_config(name)
    plain = auto_class_for(config).from_config(config, dtype=torch.float32)
    buffers = dict(plain.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[key], msg=key)


class OwnConfig(Qwen3Config):
    model_type = "own_foundation"


class Own(Qwen3ForCausalLM):
    config_class = OwnConfig


def test_a_foundation_of_ones_own_is_known_through_transformers(tmp_path: Path) -> None:
    AutoConfig.register("own_foundation", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, Own)
    keys = {**PARTS["foundation"], "model_type": "own_foundation"}
    model = build_foundation_model(overrides=keys, init_device="cpu")
    assert type(model) is Own
    model.save_pretrained(tmp_path)
    assert type(build_foundation_model(None, tmp_path, init_device="cpu")) is Own
    assert type(build_omni_model(**{**PARTS, "foundation": keys}).foundation) is Own
