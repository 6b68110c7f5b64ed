"""What an omni model is made of, as a transformers config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from veomni_models.errors import ModelError
from veomni_models.foundation import load_config


class OmniConfig(PreTrainedConfig):
    """Config of an `OmniModel`.

    Attributes:
        text_config: config of the foundation model.
        encoders: for each modality (`image`) the encoder's own config under `config`, and `merge_size`: how many
            patches in each direction become one token.
        image_token_id: the placeholder that is replaced by picture features.
    """

    model_type = "veomni_omni"

    def __init__(
        self,
        text_config: PreTrainedConfig | Mapping[str, Any] | None = None,
        encoders: Mapping[str, Mapping[str, Any]] | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _as_config(text_config)
        self.encoders = {
            name: {"merge_size": 1, **encoder, "config": _as_config(encoder["config"])}
            for name, encoder in (encoders or {}).items()
        }
        self.image_token_id = image_token_id
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values all the way down, as config.json holds them."""
        plain = super().to_dict()
        plain["text_config"] = self.text_config.to_dict() if self.text_config is not None else None
        plain["encoders"] = {
            name: {**encoder, "config": encoder["config"].to_dict()} for name, encoder in self.encoders.items()
        }
        return plain


def _as_config(config: PreTrainedConfig | Mapping[str, Any] | None) -> Any:
    if config is None or isinstance(config, PreTrainedConfig):
        return config
    keys = dict(config)
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def tokens_per_picture(config: PreTrainedConfig, merge_size: int) -> int:
    """How many tokens a picture becomes behind a vision tower of fixed resolution: (image_size / patch_size / merge)^2.

    Raises:
        ModelError: the tower has no fixed grid, or merge_size does not divide it.
    """
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        raise ModelError(f"encoder {config.model_type!r} has no square image_size and patch_size; use one that has")
    side, rest = divmod(size, patch)
    if rest or side % merge_size:
        raise ModelError(
            f"encoder {config.model_type!r}: image_size={size} gives {size / patch:g} patches of {patch} a side, "
            f"which merge_size={merge_size} must divide"
        )
    return (side // merge_size) ** 2


def is_omni_folder(folder: str | Path | None) -> bool:
    """Whether a saved omni model or its processor lies there."""
    if folder is None or not (Path(folder) / "config.json").is_file():
        return False
    return PreTrainedConfig.get_config_dict(folder)[0].get("model_type") == OmniConfig.model_type


def encoder_config(modality: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """What `OmniConfig.encoders` holds for one modality, from the keys of a YAML file."""
    own = dict(keys)
    folder = own.pop("config_path", None) or own.get("model_path")
    own.pop("model_path", None)
    merge_size = own.pop("merge_size", 1)
    try:
        config = load_config(folder, own, part="vision_config")
    except ModelError as error:
        raise ModelError(f"model.encoders.{modality}: {error}") from error
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # a pooling head would get no gradient: only patch features are used
    return {"config": config, "merge_size": merge_size}
