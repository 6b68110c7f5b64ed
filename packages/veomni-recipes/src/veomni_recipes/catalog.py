"""What ships: recipes and configurations, to be listed and to be copied out."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from veomni_config import ConfigError, Problem

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs"
_SCHEMA = "# yaml-language-server: $schema="
_OF_FOLDER = {"dit": "train_dit", "dpo": "train_dpo", "distill": "train_distill", "multimodal/omni": "train_omni_model"}
_OF_NAME = {"digits_tokenizer": "train_image_tokenizer", "qwen3_omni": "train_qwen_omni"}


def describe_recipe(module: str) -> str:
    """The first line of a script's docstring, read without importing it."""
    return (ast.get_docstring(ast.parse(_file(module).read_text(encoding="utf-8"))) or "").splitlines()[0]


def describe_config(path: Path) -> str:
    """The first statement of the comment at the top of a configuration."""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(_SCHEMA):
            comment.append(line.removeprefix("#").strip())
    return re.split(r"[.;] ", " ".join(comment))[0].rstrip(".") + "."


def shipped_configs() -> dict[str, Path]:
    """The configurations by name, such as `sft/qwen3_sft`."""
    return {str(path.relative_to(CONFIGS).with_suffix("")): path for path in sorted(CONFIGS.rglob("*.yaml"))}


def recipe_of(name: str) -> str:
    """The recipe that a shipped configuration is for."""
    folder, _, stem = name.rpartition("/")
    return (
        _OF_NAME.get(stem) or _OF_FOLDER.get(folder) or ("train_qwen_vl" if folder == "multimodal" else "train_torch")
    )


def listing(recipes: Mapping[str, str]) -> str:
    """The recipes, each with its configurations below it, one a line."""
    configs = shipped_configs()
    lines: list[str] = []
    for recipe, module in recipes.items():
        lines.append(f"{recipe:<24} {describe_recipe(module)}")
        own = [name for name in configs if recipe_of(name) == recipe]
        lines += [f"  {name:<38} {describe_config(configs[name])}" for name in own]
    return "\n".join(
        [*lines, "", "veomni cp NAME DEST copies a recipe or a configuration; veomni run RECIPE CONFIG trains."]
    )


def copy_out(name: str, destination: Path, recipes: Mapping[str, str]) -> list[Path]:
    """Copy a recipe (into a folder: with a configuration for it) or a configuration (with those that it extends).

    Returns:
        The files that were written.

    Raises:
        ConfigError: there is nothing of that name, or a file is there already.
    """
    configs = shipped_configs()
    name = name.removesuffix(".yaml").removesuffix(".py").removeprefix("configs/").removeprefix("tasks/")
    if name in recipes:
        script = _file(recipes[name])
        if destination.suffix == ".py":
            copies = {destination: script.read_text(encoding="utf-8")}
        else:
            copies = {destination / script.name: script.read_text(encoding="utf-8")}
            first = next((each for each in configs if recipe_of(each) == name), None)
            copies |= _copies(configs[first], destination / configs[first].name) if first else {}
    elif name in configs or (found := [each for each in configs if each.endswith(f"/{name}")]):
        path = configs[name if name in configs else found[0]]
        is_file = destination.suffix in (".yaml", ".yml")
        copies = _copies(path, destination if is_file else destination / path.name)
    else:
        text = f"there is no recipe or configuration {name!r}: veomni ls names them"
        raise ConfigError([Problem("", text)])
    if taken := next((path for path in copies if path.exists()), None):
        raise ConfigError([Problem("", f"{taken} is there already: give another name, or remove it")])
    for path, text in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [*copies]


def _copies(path: Path, target: Path) -> dict[Path, str]:
    """A configuration and what it extends, with the schema of this installation."""
    text = path.read_text(encoding="utf-8")
    if match := re.match(re.escape(_SCHEMA) + r"(\S+)", text):
        text = text.replace(match[1], str((path.parent / match[1]).resolve()), 1)
    copies = {target: text}
    if base := re.search(r"^extends: (\S+)$", text, re.MULTILINE):
        copies |= _copies(path.parent / base[1], target.parent / base[1])
    return copies


def _file(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)
