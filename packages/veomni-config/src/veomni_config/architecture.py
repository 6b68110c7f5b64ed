"""What a model's own configuration says about sizes that the mesh must divide."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .model import ModelConfig

_HEADS = ("num_attention_heads",)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def attention_heads(model: ModelConfig) -> int | None:
    """Attention heads of the language model; None where that is not known without the network."""
    return _find(model, _HEADS)


def experts(model: ModelConfig) -> int | None:
    """Routed experts of a layer of the language model; None where there are none or that is not known."""
    return _find(model, _EXPERTS)


def _find(model: ModelConfig, names: tuple[str, ...]) -> int | None:
    for config in (model.foundation, _stored(model.config_path)):
        for part in (config, config.get("text_config"), _text_of_thinker(config)):
            if isinstance(part, Mapping):
                for name in names:
                    value = part.get(name)
                    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                        return value
    return None


def _text_of_thinker(config: Mapping[str, Any]) -> Any:
    thinker = config.get("thinker_config")
    return thinker.get("text_config") if isinstance(thinker, Mapping) else None


def _stored(config_path: str | None) -> Mapping[str, Any]:
    """`config.json` of a local folder; empty where it is not there, which the model's builder reports."""
    if not config_path:
        return {}
    try:
        path = Path(config_path)
        stored = json.loads((path if path.suffix == ".json" else path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, Mapping) else {}
