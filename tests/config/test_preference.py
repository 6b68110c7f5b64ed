"""Keys of preference optimization, distillation, inference and evaluation."""

from __future__ import annotations

import pytest
from veomni_config import (
    ConfigError,
    DistillRecipeConfig,
    DPORecipeConfig,
    EvaluateRecipeConfig,
    InferRecipeConfig,
    parse_args,
)

DPO = ["--model.model_path=m", "--data.train_path=d.jsonl", "--train.output_dir=o"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--train.dpo_loss=ipo", "--train.dpo_label_smoothing=0.1"], "only the sigmoid loss is smoothed"),
        (["--train.rmpad=false"], "the two answers of a pair stand in one packed row: set rmpad to true"),
        (["--data.too_long=split"], "a pair cannot be cut: leave it at drop"),
        (["--train.dpo_loss=dpo"], "allowed: sigmoid, ipo, simpo, orpo"),
    ],
)
def test_what_no_pair_can_be_trained_with_is_refused(change: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_args(DPORecipeConfig, [*DPO, *change])


def test_only_dpo_and_ipo_need_a_reference() -> None:
    uses = {
        kind: parse_args(DPORecipeConfig, [*DPO, f"--train.dpo_loss={kind}"]).train.uses_reference
        for kind in ("sigmoid", "ipo", "simpo", "orpo")
    }
    assert uses == {"sigmoid": True, "ipo": True, "simpo": False, "orpo": False}


def test_a_student_made_of_keys_has_the_tokenizer_of_its_teacher() -> None:
    keys = ["--data.train_path=d.jsonl", "--train.output_dir=o", "--model.teacher_path=teacher"]
    student = parse_args(DistillRecipeConfig, [*keys, "--model.foundation={model_type: qwen3}"]).model
    assert (student.tokenizer_path, student.model_path) == ("teacher", None)
    assert parse_args(DistillRecipeConfig, [*keys, "--model.model_path=m"]).model.tokenizer_path == "m"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--infer.prompt=a", "--infer.prompts_path=b"], "leave one of them out"),
        (["--infer.output_path=a"], "a conversation is not written to a file"),
    ],
)
def test_prompts_come_from_one_place(change: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_args(InferRecipeConfig, ["--infer.model_path=m", *change])


def test_the_tokenizer_of_a_measured_model_lies_beside_it() -> None:
    keys = ["--evaluate.model_path=m", "--evaluate.data_path=d", "--evaluate.output_dir=o"]
    assert parse_args(EvaluateRecipeConfig, keys).evaluate.tokenizer_path == "m"
