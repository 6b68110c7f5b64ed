"""Adapters that learn on frozen layers in few bits: what is kept, resumed and exported."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM
from veomni_config import ConfigError, RecipeConfig, parse_args
from veomni_models import build_foundation_model
from veomni_recipes.tasks.train_torch import build_model

from tests.models.test_quantization import frozen_bytes
from tests.recipes.text_run import prepare, train

LORA = ["--train.train_architecture=lora", "--model.lora_config={r: 4}"]
IN_MEMORY = ["--train.data_parallel_mode=ddp", "--train.init_device=cpu"]


def arguments(folder: Path, bits: int, output: str) -> list[str]:
    own = [f"--model.quantize_frozen={bits}", f"--train.output_dir={folder / output}", "--train.save_hf_weights=true"]
    return [*prepare(folder), *LORA, *IN_MEMORY, *own, "--train.save_steps=4", "--train.enable_mixed_precision=true"]


def losses(run: Path) -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_on_quantised_layers_learns_resumes_and_is_exported_on_whole_weights(bits: int, tmp_path: Path) -> None:
    straight = arguments(tmp_path, bits, "straight")
    train(straight)
    assert losses(tmp_path / "straight")[-1] < losses(tmp_path / "straight")[0] - 0.1
    saved = tmp_path / "straight" / "checkpoints" / "global_step_4"
    weights = [n for n in FileSystemReader(saved).read_metadata().state_dict_metadata if n.startswith("model.")]
    assert weights, "a checkpoint of adapters"
    assert all(".lora_" in name for name in weights)
    resumed = [*arguments(tmp_path, bits, "resumed"), f"--train.load_checkpoint_path={saved}"]
    train(resumed)
    for file in ("adapter/adapter_model.safetensors", "hf_ckpt/model.safetensors"):
        one, other = (load_file(tmp_path / run / file) for run in ("straight", "resumed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(whole, tmp_path / "straight" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "straight" / "hf_ckpt", dtype=torch.float32).eval()
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-3)


def test_a_run_that_goes_wrong_says_why_and_not_that_its_weights_are_quantised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--train.lr=1e30", "--train.max_grad_norm=1e30", "--train.save_hf_weights=false"]
    with pytest.raises(SystemExit):
        train([*arguments(tmp_path, 4, "run"), *wrong])
    said = capsys.readouterr().err
    assert "step 2" in said
    assert "was not exported" not in said


def test_frozen_layers_take_less_memory(tmp_path: Path) -> None:
    sizes = {}
    for bits in (8, 4):
        cfg = parse_args(RecipeConfig, arguments(tmp_path, bits, "run"))
        model = build_model(cfg, None, torch.device("cpu"))
        outside = frozen_bytes(model.model.embed_tokens) + frozen_bytes(model.lm_head)
        sizes[bits] = frozen_bytes(model) - outside
        assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    whole = build_foundation_model(tmp_path / "model", init_device="meta").requires_grad_(False)
    full = frozen_bytes(whole.model.layers)
    assert sizes[8] < 0.4 * full
    assert sizes[4] < 0.6 * sizes[8]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--train.train_architecture=full", "--model.lora_config={}"], "set train.train_architecture to lora"),
        (["--train.data_parallel_mode=fsdp2"], "cannot be sharded: set train.data_parallel_mode to ddp"),
    ],
)
def test_what_quantised_layers_need_is_said(change: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"model.quantize_frozen.*{sentence}"):
        parse_args(RecipeConfig, [*arguments(tmp_path, 8, "run"), *change])
