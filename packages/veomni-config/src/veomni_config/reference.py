"""The page of all keys, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from .distill import DistillRecipeConfig
from .dit import DitRecipeConfig
from .infer import EvaluateConfig, InferConfig
from .omni import OmniRecipeConfig, VLRecipeConfig
from .preference import DPORecipeConfig
from .recipe import EvaluateRecipeConfig, InferRecipeConfig, RecipeConfig
from .schema import ConfigKey, allowed, config_keys
from .yaml_writer import plain_value, to_yaml

_INTRODUCTION = """\
# Configuration keys

Written by `veomni-config reference`; change the descriptions in `veomni_config`, not here.

A file has the sections below. `extends: other.yaml` at its top takes over the values of another file, `${env:NAME}` and
`${env:NAME:-default}` those of the environment. Every key can be given on the command line, which counts more than the
file: `--train.lr 1e-4`.
"""


def reference_page() -> str:
    """Markdown tables of the keys of all recipes that this package knows."""
    base = {key.dotted for key in config_keys(RecipeConfig)}
    parts = [_INTRODUCTION]
    for name, field in RecipeConfig.model_fields.items():
        parts += [
            f"## {name}\n",
            f"{_summary(field.annotation)}\n",
            _table(k for k in config_keys(RecipeConfig) if k.path[0] == name),
        ]
    for title, cls in (
        ("What the omni recipe adds", OmniRecipeConfig),
        ("What the vision-language recipe adds", VLRecipeConfig),
        ("What the recipe of diffusion transformers adds", DitRecipeConfig),
        ("What the recipe of preference optimization adds", DPORecipeConfig),
        ("What the recipe of distillation adds", DistillRecipeConfig),
    ):
        parts += [f"## {title}\n", _table(key for key in config_keys(cls) if key.dotted not in base)]
    parts += ["## infer\n", f"{_summary(InferConfig)}\n", _table(config_keys(InferRecipeConfig))]
    parts += ["## evaluate\n", f"{_summary(EvaluateConfig)}\n", _table(config_keys(EvaluateRecipeConfig))]
    return "\n".join(parts)


def _summary(section: object) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _table(keys: Iterable[ConfigKey]) -> str:
    lines = ["| key | allowed | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys:
        field = key.field
        default = "required"
        if not field.is_required():
            default = f"`{to_yaml(plain_value(field.get_default(call_default_factory=True)), flow=True)}`"
        meaning = field.description or ""
        if key.legacy:
            meaning += f" **No effect**: {key.legacy}."
        cells = (f"`{key.dotted}`", allowed(field), default, meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
