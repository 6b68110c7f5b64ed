"""Rules between keys: each names all keys involved and a value that would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from veomni_config import ConfigError, InferRecipeConfig, RecipeConfig, parse_args

BASE = ["--model.config_path=cfg", "--data.train_path=d", "--train.output_dir=out"]


def told(arguments: list[str]) -> list[str]:
    try:
        parse_args(RecipeConfig, [*BASE, *arguments])
    except ConfigError as error:
        return str(error).split("\n")
    return []


@pytest.mark.parametrize(
    ("wrong", "keys", "right"),
    [
        (
            ["--train.rmpad_with_pos_ids"],
            ["train.rmpad_with_pos_ids=true", "train.rmpad=true (default)"],
            ["--no-train.rmpad"],
        ),
        (
            ["--train.init_device=meta"],
            ["train.init_device=meta", "train.data_parallel_mode=ddp (default)"],
            ["--train.data_parallel_mode=fsdp2"],
        ),
        (
            ["--train.data_parallel_shard_size=2"],
            ["train.data_parallel_shard_size=2", "train.data_parallel_mode=ddp"],
            ["--train.data_parallel_shard_size=1"],
        ),
        (
            ["--train.enable_fsdp_offload"],
            ["train.enable_fsdp_offload=true", "train.data_parallel_mode=ddp"],
            ["--train.data_parallel_mode=fsdp2"],
        ),
        (
            ["--train.expert_parallel_size=2", "--train.data_parallel_mode=fsdp1"],
            ["train.expert_parallel_size=2", "train.data_parallel_mode=fsdp1"],
            ["--train.data_parallel_mode=fsdp2"],
        ),
        (
            ["--train.global_batch_size=7", "--train.micro_batch_size=2"],
            ["set global_batch_size to 6 or 8", "train.global_batch_size=7", "train.micro_batch_size=2"],
            ["--train.global_batch_size=8"],
        ),
        (
            ["--train.lr_min=1e-3", "--train.lr_decay_style=cosine"],
            ["set lr_min to 5e-05 or less", "train.lr_min=0.001", "train.lr=5e-05 (default)"],
            ["--train.lr_min=5e-5"],
        ),
        (
            ["--train.enable_profiling", "--train.profile_start_step=5"],
            ["set profile_end_step to 6 or more", "train.profile_start_step=5", "train.profile_end_step=2 (default)"],
            ["--train.profile_end_step=6"],
        ),
        (
            ["--train.export_checkpoint=best"],
            ["set best_metric to loss", "train.export_checkpoint=best", "train.best_metric=null (default)"],
            ["--train.best_metric=loss", "--train.eval_epochs=1"],
        ),
        (
            ["--train.best_metric=loss"],
            ["set eval_epochs to 1", "train.eval_steps=0 (default)", "train.eval_epochs=0 (default)"],
            ["--train.eval_steps=100"],
        ),
        (
            ["--train.best_metric=accuracy", "--train.eval_epochs=1"],
            ["set eval_answers to 100", "train.eval_answers=0 (default)"],
            ["--train.eval_answers=100"],
        ),
        (
            ["--model.config_path=null"],
            ["model.model_path", "model.foundation.model_type", "train.save_hf_weights=true (default)"],
            ["--model.foundation.model_type=qwen3"],
        ),
        (
            ["--train.dyn_bsz_margin=2048"],
            ["set train.dyn_bsz_margin to less than 2048", "data.max_seq_len=2048 (default)"],
            ["--train.dyn_bsz_margin=2047"],
        ),
        (
            ["--train.bsz_warmup_ratio=0.1", "--data.max_seq_len=100"],
            ["set train.bsz_warmup_init_mbtoken to 100 or less", "train.bsz_warmup_ratio=0.1"],
            ["--train.bsz_warmup_init_mbtoken=100"],
        ),
        (
            ["--data.enable_multisource"],
            ["data.enable_multisource=true", "data.train_path=d"],
            ["--data.train_path=mix.yaml"],
        ),
        (
            ["--model.foundation={num_attention_heads: 8}", "--train.ulysses_parallel_size=3"],
            ["3 does not divide the model's 8 attention heads", "train.ulysses_parallel_size to 1 or 2 or 4 or 8"],
            ["--train.ulysses_parallel_size=4"],
        ),
        (
            [
                "--model.foundation={num_experts: 6}",
                "--train.expert_parallel_size=4",
                "--train.data_parallel_mode=fsdp2",
            ],
            ["4 does not divide the model's 6 experts", "train.expert_parallel_size to 1 or 2 or 3 or 6"],
            ["--train.expert_parallel_size=3"],
        ),
        (
            [
                "--model.foundation={num_attention_heads: 8}",
                "--train.ulysses_parallel_size=4",
                "--train.tensor_parallel_size=4",
            ],
            ["4 x 4 does not divide the model's 8 attention heads", "train.tensor_parallel_size=4 (command line)"],
            ["--train.ulysses_parallel_size=2"],
        ),
        (
            ["--train.lr_warmup_ratio=0.5", "--train.lr_decay_ratio=0.5", "--train.lr_decay_style=cosine"],
            ["set lr_warmup_ratio to less than 0.5", "train.lr_decay_ratio=0.5"],
            ["--train.lr_warmup_ratio=0.4"],
        ),
    ],
)
def test_a_broken_rule_names_its_keys_and_a_way_out(wrong: list[str], keys: list[str], right: list[str]) -> None:
    (line,) = told(wrong)
    assert all(key in line for key in keys), line
    assert told([*wrong, *right]) == []


def test_the_stored_configuration_of_a_model_tells_its_heads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": 6}}))
    (line,) = told([f"--model.config_path={tmp_path}", "--train.ulysses_parallel_size=4"])
    assert "4 does not divide the model's 6 attention heads" in line


def test_a_stored_configuration_that_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert told([f"--model.config_path={tmp_path}", "--train.ulysses_parallel_size=4"]) == []


def test_a_rule_is_told_beside_a_mistake_in_another_key() -> None:
    lines = told(["--train.rmpad_with_pos_ids", "--train.seed=x"])
    assert len(lines) == 2


def test_a_rule_is_silent_about_a_key_that_is_wrong_by_itself() -> None:
    (line,) = told(["--train.rmpad_with_pos_ids", "--train.rmpad=maybe"])
    assert "'maybe' given" in line


def test_sampling_at_temperature_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"infer\.temperature: .* set do_sample to false"):
        parse_args(InferRecipeConfig, ["--infer.model_path=m", "--infer.temperature=0"])
