"""A recipe adds keys, derived values and rules by subclassing a section."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field
from veomni_config import (
    ConfigError,
    ModelConfig,
    OmniRecipeConfig,
    RecipeConfig,
    Section,
    TrainConfig,
    VLRecipeConfig,
    dump_config,
    parse_args,
    rule,
)
from veomni_config.parse import resolve
from veomni_config.show import show_config

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
    with pytest.raises(ConfigError, match=r"^command line: --train\.sources\.0\.weight: 'x' given; allowed: a number$"):
        parse_args(MixtureRecipe, [*BASE, "--train.sources=[{path: a, weight: x}]"])


class Averaging(Section):
    decay: float = 0.999


class Shape(Enum):
    ROUND = "round"
    ONE = "1"


class Odd(TrainConfig):
    averaging: Averaging | None = None
    shape: Shape = Shape.ROUND
    tags: set[str] = Field(default=set())
    pair: tuple[int, str] = (1, "a")
    names: list[str] = Field(default_factory=lambda: ["x"])


class OddRecipe(RecipeConfig):
    train: Odd


def test_a_section_may_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    for arguments, expected in (
        ([], None),
        (["--train.averaging.decay=0.9"], Averaging(decay=0.9)),
        (["--train.averaging.decay=0.9", "--train.averaging=null"], None),
        (["--train.averaging={}"], Averaging()),
    ):
        cfg = parse_args(OddRecipe, [*BASE, *arguments])
        assert cfg.train.averaging == expected
        dump_config(cfg, file)
        assert parse_args(OddRecipe, [str(file)]) == cfg
        shown = show_config(resolve(OddRecipe, [str(file)]))
        assert ("averaging: null" in shown) == (expected is None)
    with pytest.raises(ConfigError, match=r"--train\.averaging\.decay: 'x' given; allowed: number$"):
        parse_args(OddRecipe, [*BASE, "--train.averaging.decay=x"])


def test_keys_of_all_kinds_are_written_as_plain_yaml_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    cfg = parse_args(
        OddRecipe, [*BASE, "--train.shape=1", "--train.tags=[b, 007]", "--train.pair=[2, 03]", "--train.names=z"]
    )
    assert (cfg.train.shape, cfg.train.tags, cfg.train.pair) == (Shape.ONE, {"b", "007"}, (2, "03"))
    dump_config(cfg, file)
    assert yaml.safe_load(file.read_text())["train"].items() >= {"shape": "1", "tags": ["007", "b"]}.items()
    assert parse_args(OddRecipe, [str(file)]) == cfg
    with pytest.raises(ConfigError) as caught:
        parse_args(OddRecipe, [*BASE, "--train.shape=rond", "--train.pair=[a, b, c]"])
    assert "'rond' given; allowed: round, 1 (did you mean round?)" in str(caught.value)
    assert "a list given; allowed: list of whole number, text" in str(caught.value)
    assert re.search("names: \\[x\\] +# default", show_config(resolve(OddRecipe, BASE)))


def test_an_alias_is_refused_where_the_class_is_defined() -> None:
    with pytest.raises(TypeError, match=r"^Aliased\.beta: a key has one name"):

        class Aliased(TrainConfig):
            beta: float = Field(default=1.0, alias="Beta")


def test_a_rule_tells_which_values_are_derived() -> None:
    class Derived(Penalty):
        @rule("half_beta", "beta")
        def _rule(self) -> str | None:
            return "set beta to 0"

    class Recipe(RecipeConfig):
        train: Derived

    with pytest.raises(ConfigError, match=r"train\.half_beta=0\.05 \(derived\), train\.beta=0\.1 \(default\)"):
        parse_args(Recipe, BASE)


def test_the_recipes_for_pictures_have_their_keys() -> None:
    omni = parse_args(OmniRecipeConfig, [*BASE, "--train.freeze_encoder", "--data.max_image_nums=3"])
    assert (omni.train.freeze_encoder, omni.data.max_image_nums, omni.data.max_pixels) == (True, 3, 768 * 28 * 28)
    assert parse_args(VLRecipeConfig, [*BASE, "--train.freeze_vit"]).train.freeze_vit
