"""The JSON Schema underlines what the loader refuses, and nothing that it takes."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from veomni_config import ConfigError, RecipeConfig, TrainConfig, parse_args
from veomni_config.json_schema import file_schema
from veomni_config.yaml_writer import to_yaml

TYPES: dict[str, Any] = {
    "null": type(None),
    "boolean": bool,
    "integer": int,
    "number": int | float,
    "string": str,
    "array": list,
    "object": dict,
}
BASE = {"model": {"config_path": "m"}, "data": {"train_path": "d"}, "train": {"output_dir": "o"}}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether `value` is valid, by the part of JSON Schema that is used here."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    if "anyOf" in schema and not any(fits(value, each, root) for each in schema["anyOf"]):
        return False
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0) and re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, int | float):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, list):
        return all(fits(each, schema.get("items", {}), root) for each in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        more = schema.get("additionalProperties", {})
        names = schema.get("propertyNames", {})
        return all(
            fits(name, names, root)
            and (fits(each, known.get(name, more), root) if name in known or isinstance(more, dict) else more)
            for name, each in value.items()
        )
    return True


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("train.use_wandb", [True, "yes", "Off", 1], ["maybe", 2, None]),
        ("train.async_enabled", [None, False, "no"], ["never"]),
        ("train.lr", [1, 1e-4, "1e-4", "0.5"], ["fast", -1, None]),
        ("train.seed", [1, "7"], [1.5, "x"]),
        ("train.max_steps", [None, "10"], [0]),
        ("train.no_decay_params", [None, ["a"]], [[{}], 3]),
        ("train.output_dir", ["out"], ["", None]),
        ("model.encoders", [None, {"image": {}}], [{"smell": {}}]),
        ("model.foundation", [None, {"a": [1]}], [1]),
    ],
)
def test_the_schema_takes_what_the_loader_takes(key: str, right: list[Any], wrong: list[Any], tmp_path: Path) -> None:
    section, name = key.split(".")
    schema = file_schema(RecipeConfig)
    for value in (*right, *wrong):
        config = BASE | {section: BASE[section] | {name: value}}
        assert fits(config, schema, schema) == (value in right), value
        (tmp_path / "run.yaml").write_text(to_yaml(config))
        assert loads(RecipeConfig, tmp_path / "run.yaml") == (value in right), value


class Shape(Enum):
    ROUND = "round"


class ShapedTrain(TrainConfig):
    shape: Shape = Shape.ROUND


class Shaped(RecipeConfig):
    train: ShapedTrain
    note: str = ""


def test_an_added_key_of_any_kind_is_in_the_schema() -> None:
    schema = file_schema(Shaped)
    for shape, expected in (("round", True), ("${env:SHAPE}", True), ("square", False)):
        assert fits({"train": {"shape": shape}, "note": "x"}, schema, schema) == expected


def loads(cls: type[BaseModel], file: Path) -> bool:
    try:
        parse_args(cls, [str(file)])
    except ConfigError:
        return False
    return True
