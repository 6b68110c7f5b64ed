"""LoRA adapters are merged as peft would, in whole numbers of rows at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from veomni_ckpt import CheckpointError, dcp_to_hf
from veomni_ckpt.cli import main

Tensors = dict[str, torch.Tensor]


def save(state: dict[str, Any], folder: Path) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def adapted(dtype: torch.dtype = torch.float32, adapter: str = "default") -> Tensors:
    """A model of peft's names: a linear layer, an embedding, an untouched norm, and a head that was trained whole."""
    torch.manual_seed(0)
    root = "base_model.model.model"
    return {
        f"{root}.q_proj.base_layer.weight": torch.randn(6, 5, dtype=dtype),
        f"{root}.q_proj.base_layer.bias": torch.randn(6, dtype=dtype),
        f"{root}.q_proj.lora_A.{adapter}.weight": torch.randn(2, 5),
        f"{root}.q_proj.lora_B.{adapter}.weight": torch.randn(6, 2),
        f"{root}.embed_tokens.base_layer.weight": torch.randn(7, 4, dtype=dtype),
        f"{root}.embed_tokens.lora_embedding_A.{adapter}": torch.randn(2, 7),
        f"{root}.embed_tokens.lora_embedding_B.{adapter}": torch.randn(4, 2),
        f"{root}.norm.weight": torch.randn(5, dtype=dtype),
        "base_model.model.lm_head.original_module.weight": torch.zeros(3, 5, dtype=dtype),
        f"base_model.model.lm_head.modules_to_save.{adapter}.weight": torch.randn(3, 5, dtype=dtype),
    }


def merged(state: Tensors, scale: float, adapter: str = "default") -> Tensors:
    root = "base_model.model.model"
    linear = state[f"{root}.q_proj.lora_B.{adapter}.weight"] @ state[f"{root}.q_proj.lora_A.{adapter}.weight"]
    a, b = (state[f"{root}.embed_tokens.lora_embedding_{part}.{adapter}"] for part in "AB")
    q, e = state[f"{root}.q_proj.base_layer.weight"], state[f"{root}.embed_tokens.base_layer.weight"]
    return {
        "model.q_proj.weight": (q.float() + scale * linear).to(q.dtype),
        "model.q_proj.bias": state[f"{root}.q_proj.base_layer.bias"],
        "model.embed_tokens.weight": (e.float() + scale * (b @ a).T).to(e.dtype),
        "model.norm.weight": state[f"{root}.norm.weight"],
        "lm_head.weight": state[f"base_model.model.lm_head.modules_to_save.{adapter}.weight"],
    }


def assert_close(folder: Path, expected: Tensors) -> None:
    got = load_file(folder / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        torch.testing.assert_close(got[name], tensor, rtol=1e-2 if tensor.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [2**19, 16])
def test_adapters_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    for module in ("to_hf", "file_writer"):
        monkeypatch.setattr(f"veomni_ckpt.{module}.BLOCK", block)
    state = adapted(dtype)
    save({"model": state}, tmp_path / "dcp")
    done = dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", merge_lora=True, lora_alpha=16)
    assert_close(tmp_path / "hf", merged(state, 16 / 2))
    assert not done.has_adapters


def test_the_scale_comes_from_the_adapter_config(tmp_path: Path) -> None:
    state = adapted()
    folder = save({"model": state}, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match="scale of the LoRA adapter is unknown"):
        dcp_to_hf(folder, tmp_path / "hf", merge_lora=True)
    for number, (config, scale) in enumerate(
        [
            ({"lora_alpha": 4}, 2.0),
            ({"lora_alpha": 4, "use_rslora": True}, 4 / math.sqrt(2)),
            ({"lora_alpha": 4, "alpha_pattern": {"q_proj": 6, "^model.embed_tokens": 6, "^tokens": 1, "norm": 1}}, 3.0),
        ]
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        dcp_to_hf(folder, tmp_path / f"hf{number}", merge_lora=True)
        assert_close(tmp_path / f"hf{number}", merged(state, scale))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "adapter_config.json is no JSON object"),
        ("[" * 100_000, "adapter_config.json cannot be read"),
        ('{"lora_alpha": "16"}', "scale of the LoRA adapter is unknown"),
        ('{"lora_alpha": true}', "scale of the LoRA adapter is unknown"),
        ('{"lora_alpha": NaN}', "scale of the LoRA adapter is unknown"),
        ('{"lora_alpha": 1e400}', "scale of the LoRA adapter is unknown"),
        ('{"lora_alpha": 1%s}' % ("0" * 400), "scale of the LoRA adapter is unknown"),
        ('{"lora_alpha": 4, "alpha_pattern": {"(a*)*b": 2}}', r"alpha_pattern .* which is no name: give lora_alpha"),
    ],
    ids=range(8),
)
def test_an_adapter_config_that_is_wrong_is_named(tmp_path: Path, config: str, message: str) -> None:
    folder = save({"model": adapted()}, tmp_path / "dcp")
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        dcp_to_hf(folder, tmp_path / "hf", merge_lora=True)
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


def test_the_command_merges_when_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save({"model": adapted()}, tmp_path / "dcp")
    assert main(["to-hf", str(folder), str(tmp_path / "as it is")]) == 0
    assert "--merge-lora merges them" in capsys.readouterr().out
    assert main(["to-hf", str(folder), str(tmp_path / "hf"), "--merge-lora=default", "--lora-alpha", "16"]) == 0
    assert_close(tmp_path / "hf", merged(adapted(), 8.0))


def test_an_adapter_alone_is_merged_into_the_base_model(tmp_path: Path) -> None:
    state = adapted()
    base = tmp_path / "base"
    base.mkdir()
    weights = {
        name.removeprefix("base_model.model.").replace("base_layer.", "").replace("original_module.", ""): tensor
        for name, tensor in state.items()
        if "lora_" not in name and "modules_to_save" not in name
    }
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    adapter = {name: tensor for name, tensor in state.items() if "lora_" in name or "modules_to_save" in name}
    save({"model": adapter}, tmp_path / "dcp")
    done = dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", merge_lora=True, lora_alpha=2, base_model=base)
    assert_close(tmp_path / "hf", merged(state, 1.0))
    assert done.assets == ["config.json"]
    with pytest.raises(CheckpointError, match=r"has an adapter for model\.\S+\.weight and not that weight"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "none", merge_lora=True, lora_alpha=2)


def test_of_several_adapters_one_is_named(tmp_path: Path) -> None:
    state = adapted(adapter="first") | {
        name: tensor * 2 for name, tensor in adapted(adapter="second").items() if "second" in name
    }
    save({"model": state}, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match="has the adapters first, second: say which to merge"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", merge_lora=True, lora_alpha=2)
    with pytest.raises(CheckpointError, match="no LoRA adapter 'third' to merge; it has first, second"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", merge_lora="third", lora_alpha=2)
    dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", merge_lora="second", lora_alpha=2)
    assert_close(tmp_path / "hf", merged(state, 1.0, "second"))


def test_unmerged_adapters_are_written_as_they_are_and_said(tmp_path: Path) -> None:
    state = adapted()
    save({"model": state}, tmp_path / "dcp")
    assert dcp_to_hf(tmp_path / "dcp", tmp_path / "hf").has_adapters
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == state.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q.lora_A.default.weight": torch.zeros(2, 9)}, r"do not fit \S*q\.base_layer\.weight \[6, 5\]"),
        ({"q.lora_B.default.weight": torch.zeros(6, 3)}, r"do not fit \S*q\.base_layer\.weight \[6, 5\]"),
        ({"q.base_layer.weight": torch.zeros(6, 5, dtype=torch.int8)}, "whole numbers"),
        ({"q.base_layer.weight": torch.zeros(6, 5, 1)}, "only matrices can be merged"),
        ({"q.lora_magnitude_vector.default.weight": torch.zeros(6)}, "DoRA"),
        ({"q.lora_B.default.bias": torch.zeros(6)}, "adapters with a bias"),
        ({"q.lora_B.default.weight": None}, "only one half of the adapter of q"),
    ],
)
def test_what_cannot_be_merged_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {
        "q.base_layer.weight": torch.zeros(6, 5),
        "q.lora_A.default.weight": torch.zeros(2, 5),
        "q.lora_B.default.weight": torch.zeros(6, 2),
        **change,
    }
    save({"model": {name: tensor for name, tensor in state.items() if tensor is not None}}, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=message):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", merge_lora=True, lora_alpha=2)
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]
