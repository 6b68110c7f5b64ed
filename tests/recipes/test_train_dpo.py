"""Whole runs of `train_dpo` and `train_distill`: the same numbers however they are spread."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from transformers import Qwen3Config, Qwen3ForCausalLM
from veomni_recipes.run_folder import VALIDATION, read_metrics
from veomni_recipes.smoke import tiny_tokenizer
from veomni_recipes.smoke_data import texts, write_preferences


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, another one, pairs and texts."""
    folder = tmp_path_factory.mktemp("preference")
    tokenizer = tiny_tokenizer(texts()[:200], 400)
    for seed, name in enumerate(("model", "teacher")):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=len(tokenizer)))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_preferences(folder / "all.jsonl", None)
    pairs = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    plain = [json.dumps({"text": text[:300]}) + "\n" for text in texts()]
    for name, lines in (("pairs", pairs), ("texts", plain)):
        (folder / f"{name}.jsonl").write_text("".join(lines[:60]))
        (folder / f"{name}_held_out.jsonl").write_text("".join(lines[60:67]))
    return folder


def run(recipe: str, folder: Path, data: str, output: Path, *more: str) -> dict[str, Any]:
    importlib.import_module(f"veomni_recipes.tasks.{recipe}").main(
        [
            f"--model.model_path={folder}/model",
            f"--data.train_path={folder}/{data}.jsonl",
            f"--data.eval_path={folder}/{data}_held_out.jsonl",
            "--data.max_seq_len=1024",
            "--data.train_size=12000",
            "--data.num_workers=0",
            f"--train.output_dir={output}",
            "--train.max_steps=3",
            "--train.eval_steps=3",
            "--train.global_batch_size=2",
            "--train.enable_mixed_precision=false",
            "--train.data_parallel_mode=fsdp2",
            "--train.init_device=meta",
            "--train.lr=5e-3",
            "--train.save_epochs=0",
            *more,
        ]
    )
    return {"metrics": read_metrics(output), "validation": read_metrics(output, VALIDATION)}


LAYOUTS = {"fsdp2": [], "ulysses": ["--train.ulysses_parallel_size=2"]}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return run("train_dpo", folder, "pairs", folder / "alone")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_preferences_are_learnt_alike_on_two_ranks(
    layout: str, folder: Path, alone: dict[str, Any], tmp_path: Path, two_ranks: Ranks
) -> None:
    spread = two_ranks.run(run, "train_dpo", folder, "pairs", tmp_path, *LAYOUTS[layout])[0]
    # a margin is a difference of sums of some hundred nats, of which float32 keeps five decimals
    for name in ("loss", "margin", "accuracy", "ranking", "grad_norm", "pairs"):
        got, want = ([line[name] for line in each["metrics"]] for each in (spread, alone))
        assert got == pytest.approx(want, rel=1e-4, abs=2e-5), name
    for name in ("loss", "margin", "accuracy", "ranking"):
        assert spread["validation"][0][name] == pytest.approx(alone["validation"][0][name], rel=1e-4, abs=2e-5), name
    assert spread["validation"][0]["pairs"] == alone["validation"][0]["pairs"] == 7


def test_a_run_tells_of_held_out_pairs_before_and_after(folder: Path, alone: dict[str, Any]) -> None:
    held_out = json.loads((folder / "alone" / "summary.json").read_text())["held_out"]
    assert held_out["before"]["margin"] == pytest.approx(0, abs=1e-5)
    assert held_out["before"]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert held_out["after"]["margin"] == pytest.approx(alone["validation"][0]["margin"])
    assert held_out["after"]["margin"] > 0
    assert alone["metrics"][0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the model is its reference"
    assert held_out["after"]["loss"] < held_out["before"]["loss"]
    assert (folder / "alone" / "hf_ckpt" / "model.safetensors").is_file()


def test_a_model_is_the_reference_of_its_adapters(folder: Path, tmp_path: Path) -> None:
    made = run("train_dpo", folder, "pairs", tmp_path, "--train.train_architecture=lora", "--train.lr=5e-2")
    assert made["metrics"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert made["validation"][0]["loss"] < 0.6931
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_student_comes_closer_to_its_teacher_on_texts_it_has_not_seen(
    folder: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    more = [f"--model.teacher_path={folder}/teacher", "--train.distill_weight=1", "--data.data_type=plaintext"]
    more += ["--data.text_keys=text", "--train.eval_steps=1"]
    alone = run("train_distill", folder, "texts", tmp_path / "1", *more)
    spread = two_ranks.run(run, "train_distill", folder, "texts", tmp_path / "2", *more)[0]
    for part in ("metrics", "validation"):
        got, want = ([line["loss"] for line in each[part]] for each in (spread, alone))
        assert got == pytest.approx(want, rel=1e-4), part
    assert alone["validation"][-1]["loss"] < 0.8 * alone["validation"][0]["loss"]
