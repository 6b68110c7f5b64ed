"""What `dump_config` writes is read back equal, whatever the values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from veomni_config import OmniRecipeConfig, dump_config, parse_args
from veomni_config.schema import ConfigKey, config_keys

REQUIRED = {("model", "config_path"): "cfg", ("data", "train_path"): "d", ("train", "output_dir"): "out"}
TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["1e-4", "null", "~", "yes", "007", "${env:HOME}", "$${", "<<", "- a", "a: b", " x ", "#", "'", "\u2028"]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def values_of(key: ConfigKey) -> st.SearchStrategy[Any]:
    """Values that a key allows, by its annotation and bounds."""
    bounds: dict[type, Any] = {type(item): item for item in key.field.metadata}
    choices: list[st.SearchStrategy[Any]] = []
    if get_origin(key.field.annotation) is tuple and float in get_args(key.field.annotation):
        places = len(get_args(key.field.annotation))
        return st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=places, max_size=places)
    for arm in get_args(key.field.annotation) or (key.field.annotation,):
        if get_origin(key.field.annotation) is Literal:
            choices.append(st.just(arm))
        elif get_origin(arm) is Literal:
            choices.append(st.sampled_from(get_args(arm)))
        elif arm is type(None):
            choices.append(st.none())
        elif arm is bool:
            choices.append(st.booleans())
        elif arm is int:
            low = bounds[Ge].ge if Ge in bounds else 1
            high = bounds[Lt].lt - 1 if Lt in bounds else bounds[Le].le if Le in bounds else low + 1000
            choices.append(st.integers(low, high))
        elif arm is float:
            low = bounds[Ge].ge if Ge in bounds else math.nextafter(bounds[Gt].gt, math.inf)
            high = math.nextafter(bounds[Lt].lt, -math.inf) if Lt in bounds else 1e9
            choices.append(st.floats(low, bounds[Le].le if Le in bounds else high))
        elif arm is str:
            choices.append(TEXT.filter(bool))
    origin = get_origin(key.field.annotation)
    if origin is tuple:
        return st.lists(TEXT, max_size=4)
    if origin is dict and get_origin(get_args(key.field.annotation)[0]) is Literal:
        return st.dictionaries(
            st.sampled_from(get_args(get_args(key.field.annotation)[0])), st.dictionaries(TEXT, VALUES, max_size=3)
        )
    if origin is dict:
        return st.dictionaries(TEXT, VALUES, max_size=4)
    return st.one_of(choices or [TEXT.filter(bool)])


KEYS = {key.path: values_of(key) for key in config_keys(OmniRecipeConfig)}


@st.composite
def configs(draw: st.DrawFn) -> OmniRecipeConfig:
    """Valid configurations; a key whose value breaks a rule with the others is left out again."""
    sections: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "train": {}}
    for (section, name), value in REQUIRED.items():
        sections[section][name] = value
    config = OmniRecipeConfig.model_validate(sections)
    for section, name in draw(st.lists(st.sampled_from(sorted(KEYS)), max_size=12, unique=True)):
        before = dict(sections[section])
        sections[section][name] = draw(KEYS[section, name])
        try:
            config = OmniRecipeConfig.model_validate(sections)
        except ValidationError:
            sections[section] = before
    return config


def reads_back_equal(config: OmniRecipeConfig, folder: Path) -> None:
    dump_config(config, folder / "out.yaml")
    again = parse_args(OmniRecipeConfig, [str(folder / "out.yaml")])
    assert again == config
    assert repr(again) == repr(config)  # 1 is not 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round_trip")


@pytest.mark.filterwarnings("ignore::veomni_config.ConfigWarning")
@settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(configs())
def test_a_configuration_is_written_and_read_back_equal(folder: Path, config: OmniRecipeConfig) -> None:
    reads_back_equal(config, folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::veomni_config.ConfigWarning")
@settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(configs())
def test_a_thousand_configurations_are_written_and_read_back_equal(folder: Path, config: OmniRecipeConfig) -> None:
    reads_back_equal(config, folder)


def test_other_yaml_readers_see_the_same_values(folder: Path) -> None:
    arguments = [f"--{'.'.join(path)}={value}" for path, value in REQUIRED.items()]
    config = parse_args(OmniRecipeConfig, [*arguments, "--train.lr=1e-5", "--train.wandb_name=no"])
    dump_config(config, folder / "out.yaml")
    plain = yaml.safe_load((folder / "out.yaml").read_text())
    assert (plain["train"]["lr"], plain["train"]["wandb_name"], plain["train"]["output_dir"]) == (1e-5, "no", "out")
