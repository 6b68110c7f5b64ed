"""What an omni model is made of, as a transformers config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from veomni_models.errors import ModelError
from veomni_models.foundation import load_config
from veomni_models.projectors import projected_tokens, projector_class, projector_keys
from veomni_models.towers import Shape, kind_of, square_grid, without_randomness

MODALITIES = ("image", "video", "audio")
_OWN_KEYS = ("config_path", "model_path", "merge_size", "projector", "share")


class OmniConfig(PreTrainedConfig):
    """Config of an `OmniModel`.

    Attributes:
        text_config: config of the foundation model.
        encoders: for each modality (`image`, `video`, `audio`) the encoder's own config under `config`; `merge_size`,
            how many patches in each direction, or neighbours in time, become one token; and `projector`, its `type` and
            options. Videos may have `share: image` instead, which sends their frames through the encoder of pictures.
        image_token_id, video_token_id, audio_token_id: the placeholders that features of each modality replace.
        decoders: for `image` what draws pictures: the decoder's own config under `config`, and under `drawing` those of
            `DrawingOptions` that are not left at their defaults.
        image_gen_token_id, image_gen_start_token_id, image_gen_end_token_id: the placeholder of a picture to draw,
            which stands as often as the decoder has tokens, and what stands before and behind.
        first_code_id: where the codes of a discrete decoder begin in the foundation's vocabulary.
        input_encoder: `encoder`, or `decoder`: pictures that are read become codes of the discrete decoder too, without
            an encoder.
    """

    model_type = "veomni_omni"

    def __init__(
        self,
        text_config: PreTrainedConfig | Mapping[str, Any] | None = None,
        encoders: Mapping[str, Mapping[str, Any]] | None = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        audio_token_id: int | None = None,
        decoders: Mapping[str, Mapping[str, Any]] | None = None,
        image_gen_token_id: int | None = None,
        image_gen_start_token_id: int | None = None,
        image_gen_end_token_id: int | None = None,
        first_code_id: int | None = None,
        input_encoder: str = "encoder",
        **kwargs: Any,
    ) -> None:
        self.text_config = _as_config(text_config)
        self.encoders = {
            name: dict(encoder)
            if "share" in encoder
            else {"merge_size": 1, "projector": {"type": "mlp"}, **encoder, "config": _as_config(encoder["config"])}
            for name, encoder in (encoders or {}).items()
        }
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        self.audio_token_id = audio_token_id
        self.decoders = {
            name: {**decoder, "config": _as_config(decoder["config"])} for name, decoder in (decoders or {}).items()
        }
        self.image_gen_token_id, self.first_code_id = image_gen_token_id, first_code_id
        self.image_gen_start_token_id, self.image_gen_end_token_id = image_gen_start_token_id, image_gen_end_token_id
        self.input_encoder = input_encoder
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values all the way down, as config.json holds them."""
        plain = super().to_dict()
        plain["text_config"] = self.text_config.to_dict() if self.text_config is not None else None
        plain["encoders"], plain["decoders"] = plain_parts(self.encoders), plain_parts(self.decoders)
        return plain


def plain_parts(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`OmniConfig.encoders` or `.decoders` as plain values, as JSON holds them."""
    return {
        name: {key: value.to_dict() if key == "config" else value for key, value in part.items()}
        for name, part in parts.items()
    }


def _as_config(config: PreTrainedConfig | Mapping[str, Any] | None) -> Any:
    if config is None or isinstance(config, PreTrainedConfig):
        return config
    keys = dict(config)
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def is_omni_folder(folder: str | Path | None) -> bool:
    """Whether a saved omni model or its processor lies there."""
    if folder is None or not (Path(folder) / "config.json").is_file():
        return False
    return PreTrainedConfig.get_config_dict(folder)[0].get("model_type") == OmniConfig.model_type


def encoder_configs(encoders: Mapping[Any, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `OmniConfig.encoders` holds, from the keys of a YAML file.

    Raises:
        ModelError: a modality, config or projector that cannot be used, with the key that names it.
    """
    unknown = sorted(set(encoders) - set(MODALITIES))
    if unknown:
        raise ModelError(f"model.encoders.{unknown[0]}: unknown modality, encoders are built for {sorted(MODALITIES)}")
    configs = {}
    for modality in MODALITIES:
        if modality in encoders:
            try:
                configs[modality] = _encoder_config(modality, encoders[modality])
            except ModelError as error:
                raise ModelError(f"model.encoders.{modality}: {error}") from error
    for modality, config in configs.items():
        if "share" in config and "config" not in configs.get(config["share"], {}):
            raise ModelError(f"model.encoders.{modality}.share: there is no model.encoders.{config['share']} to share")
    for modality, config in configs.items():
        of = configs[config.get("share", modality)]["config"]
        if modality not in kind_of(of).modalities:
            raise ModelError(f"model.encoders.{modality}: a {of.model_type} encoder does not take {modality} inputs")
    return configs


def _encoder_config(modality: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    if "share" in keys:
        if modality != "video" or keys["share"] != "image" or len(keys) > 1:
            raise ModelError(f"{dict(keys)} cannot be shared: only video has `share: image`, and no key beside it")
        return {"share": "image"}
    own = {key: value for key, value in keys.items() if key not in _OWN_KEYS}
    folder = keys.get("config_path") or keys.get("model_path")
    config = load_config(folder, own, part="audio_config" if modality == "audio" else "vision_config")
    without_randomness(config, own)
    projector = projector_keys(keys.get("projector", "mlp"))
    merge_size = keys.get("merge_size", getattr(projector_class(projector["type"]), "merge_size", 1))
    if not isinstance(merge_size, int) or merge_size < 1:
        raise ModelError(f"merge_size={merge_size!r} must be a whole number of at least 1")
    if kind_of(config).name == "square":
        height, width, _ = square_grid(config)
        if height % merge_size or width % merge_size:
            raise ModelError(
                f"encoder {config.model_type!r}: image_size={config.image_size} gives a grid of {height} x {width} "
                f"features, which merge_size={merge_size} must divide"
            )
    return {"config": config, "merge_size": merge_size, "projector": projector}


def token_counts(encoder: Mapping[str, Any], shapes: list[Shape]) -> list[int]:
    """How many tokens pictures, frames or sounds become whose features have these shapes.

    Args:
        encoder: one of `OmniConfig.encoders`, with a `config`.
        shapes: (height, width) or (length,) of each.
    """
    counts = []
    for shape in shapes:
        merged = 1
        for side in shape:
            merged *= -(-side // encoder["merge_size"])
        counts.append(projected_tokens(encoder["projector"], merged))
    return counts
