"""A recipe adds keys, derived values and rules by subclassing a section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from veomni_config import (
    ConfigError,
    ModelConfig,
    OmniRecipeConfig,
    RecipeConfig,
    TrainConfig,
    VLRecipeConfig,
    dump_config,
    parse_args,
    rule,
)

BASE = ["--model.config_path=cfg", "--data.train_path=d", "--train.output_dir=out"]


class Penalty(TrainConfig):
    beta: float = Field(default=0.1, ge=0, description="Weight of the penalty.")
    half_beta: float | None = Field(default=None, description="Half of it.")

    def derive(self) -> dict[str, Any]:
        return super().derive() | {"half_beta": self.beta / 2}

    @rule("beta", "lr")
    def _small_steps(self) -> str | None:
        return "set beta to 1 or less" if self.beta > 1 and self.lr > 1e-3 else None


class Teacher(ModelConfig):
    teacher_path: str = Field(description="Folder of the teacher.")


class Distillation(RecipeConfig):
    model: Teacher
    train: Penalty


def test_added_keys_are_read_and_checked_like_all_others() -> None:
    cfg = parse_args(Distillation, [*BASE, "--model.teacher_path=t", "--train.beta", "0.5"])
    assert (cfg.model.teacher_path, cfg.train.beta, cfg.train.half_beta) == ("t", 0.5, 0.25)
    assert cfg.model.tokenizer_path == "cfg"
    with pytest.raises(ConfigError) as caught:
        parse_args(Distillation, [*BASE, "--train.bta=1", "--train.beta=-1"])
    assert {tuple(line.split(": ")[1:3]) for line in str(caught.value).splitlines()} == {
        ("--train.bta", "unknown key, did you mean --train.beta?"),
        ("--train.beta", "-1 given; allowed"),
        ("--model.teacher_path", "required and not given"),
    }


def test_added_rules_are_told_beside_those_of_the_base() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(
            Distillation,
            [*BASE, "--model.teacher_path=t", "--train.beta=2", "--train.lr=1", "--train.init_device=meta"],
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert any("set beta to 1 or less; given: train.beta=2.0 (command line), train.lr=1.0" in line for line in lines)


def test_a_subclass_is_written_and_read_back_equal(tmp_path: Path) -> None:
    cfg = parse_args(Distillation, [*BASE, "--model.teacher_path=t", "--train.beta", "0.5"])
    dump_config(cfg, tmp_path / "run.yaml")
    assert parse_args(Distillation, [str(tmp_path / "run.yaml")]) == cfg


class Source(BaseModel):
    path: str
    weight: float = 1.0


class Mixture(TrainConfig):
    sources: tuple[Source, ...] = ()


class MixtureRecipe(RecipeConfig):
    train: Mixture


def test_a_key_may_hold_a_list_of_models(tmp_path: Path) -> None:
    cfg = parse_args(MixtureRecipe, [*BASE, "--train.sources=[{path: a}, {path: b, weight: 2}]"])
    assert [(source.path, source.weight) for source in cfg.train.sources] == [("a", 1.0), ("b", 2.0)]
    dump_config(cfg, tmp_path / "run.yaml")
    assert parse_args(MixtureRecipe, [str(tmp_path / "run.yaml")]) == cfg
    with pytest.raises(ConfigError, match=r"^command line: --train\.sources\.0\.weight: 'x' given; input should be"):
        parse_args(MixtureRecipe, [*BASE, "--train.sources=[{path: a, weight: x}]"])


def test_the_recipes_for_pictures_have_their_keys() -> None:
    omni = parse_args(OmniRecipeConfig, [*BASE, "--train.freeze_encoder", "--data.max_image_nums=3"])
    assert (omni.train.freeze_encoder, omni.data.max_image_nums, omni.data.max_pixels) == (True, 3, 768 * 28 * 28)
    assert parse_args(VLRecipeConfig, [*BASE, "--train.freeze_vit"]).train.freeze_vit
