"""Decoders of an omni model, by which it draws: what is asked of them, and which there are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from veomni_models.errors import ModelError
from veomni_models.flow_decoder import FlowDecoder
from veomni_models.foundation import load_config
from veomni_models.initialization import initialize_weights
from veomni_models.vq_tokenizer import VQTokenizer

_OWN_KEYS = ("config_path", "model_path")
_DRAWING_KEYS = ("guidance_scale", "temperature", "num_steps")

_DECODERS: dict[str, type[PreTrainedModel]] = {}


def register_decoder(name: str, model_class: type[PreTrainedModel]) -> None:
    """Make a decoder of one's own known under the `model_type` that `model.decoders.image` may say.

    Args:
        name: its `model_type`, that of its config class.
        model_class: a `PreTrainedModel` with a `config_class`, `image_size` and `num_tokens` (of the class, or of its
            config), in one of two ways. Discrete: `num_codes`, `codes(pixel_values [n, 3, S, S])` -> int64
            [n, num_tokens] and `pictures(codes)` -> pixel values; it is frozen. Continuous: `queries`
            [num_tokens, condition_size] that stand at a picture's tokens, `loss(condition, pixel_values, seed)` -> [n]
            and `sample(condition, unconditional, guidance_scale=, num_steps=, generator=)` -> pixel values, with
            `condition` [n, num_tokens, condition_size], the foundation's states there; `condition_size` and
            `loss_weight` are keys of its config.

    Raises:
        ModelError: the name is not its config's, or another class's.
    """
    config_class = cast(Any, model_class.config_class)
    if config_class is None or config_class.model_type != name:
        raise ModelError(f"decoder {name!r}: {model_class.__name__}.config_class must have model_type = {name!r}")
    known = _DECODERS.setdefault(name, model_class)
    if known is not model_class:
        raise ModelError(f"decoder {name!r} is {known.__name__} already: register yours under another name")
    AutoConfig.register(name, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)


def decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a decoder; ModelError if there is none."""
    if config.model_type not in _DECODERS:
        raise ModelError(f"no decoder is of model_type {config.model_type!r}: use one of {sorted(_DECODERS)}")
    return _DECODERS[config.model_type]


def decoder_configs(decoders: Mapping[Any, Mapping[str, Any]], condition_size: int | None) -> dict[str, Any]:
    """What `OmniConfig.decoders` holds, from the keys of a YAML file.

    Args:
        decoders: `image` to the keys `config_path`, `model_path`, how to draw (`guidance_scale`, `temperature`,
            `num_steps`), and keys of the decoder's config.
        condition_size: hidden size of the foundation; None leaves it as it is.

    Raises:
        ModelError: a modality or config that cannot be used, with the key that names it.
    """
    unknown = sorted(set(decoders) - {"image"})
    if unknown:
        raise ModelError(f"model.decoders.{unknown[0]}: unknown modality, decoders are built for image")
    configs = {}
    for modality, keys in decoders.items():
        own = {key: value for key, value in keys.items() if key not in (*_OWN_KEYS, *_DRAWING_KEYS)}
        try:
            config = load_config(keys.get("config_path") or keys.get("model_path"), own, part="vq_config")
            decoder_class(config)
            if condition_size is not None and hasattr(config, "condition_size"):
                config.condition_size = condition_size
            _on_meta(config)
        except ModelError as error:
            raise ModelError(f"model.decoders.{modality}: {error}") from error
        drawing = {key: keys[key] for key in _DRAWING_KEYS if key in keys}
        configs[str(modality)] = {"config": config, "drawing": drawing}
    return configs


def build_decoder(config: PreTrainedConfig) -> Any:
    """A decoder; a discrete one is frozen, since no gradient of the language model's reaches it."""
    decoder: nn.Module = decoder_class(config)._from_config(config)
    return decoder.requires_grad_(not is_discrete(config))


def build_picture_decoder(keys: Mapping[str, Any], *, seed: int = 0) -> Any:
    """What draws pictures, alone and with weights drawn after `seed`: to be trained before an omni model has it.

    Args:
        keys: of `model.decoders.image`.

    Raises:
        ModelError: as for `build_omni_model`.
    """
    config = decoder_configs({"image": keys}, None)["image"]["config"]
    with torch.device("meta"):
        decoder = decoder_class(config)._from_config(config)
    initialize_weights(decoder, seed, "cpu")
    return decoder


def is_discrete(config: PreTrainedConfig) -> bool:
    """Whether pictures are codes that the foundation predicts as tokens of its vocabulary."""
    return hasattr(decoder_class(config), "codes")


def check_encoding(
    encoders: Collection[str], decoders: Mapping[str, Any], input_encoder: str, output_encoder: str, encode_target: bool
) -> None:
    """ModelError for a choice of what encodes pictures that these parts cannot make.

    Args:
        encoders: the modalities with an encoder.
        decoders: as `OmniConfig.decoders`.
        input_encoder, output_encoder, encode_target: as for `build_omni_model`.
    """
    config = decoders["image"]["config"] if "image" in decoders else None
    found = "there is none" if config is None else f"a {config.model_type} has no codes of pictures"
    encodes = config is not None and is_discrete(config)
    for name, value in (("input_encoder", input_encoder), ("output_encoder", output_encoder)):
        if value not in ("encoder", "decoder"):
            raise ModelError(f"model.{name}: {value!r} must be 'encoder' or 'decoder'")
    if input_encoder == "decoder" and not encodes:
        raise ModelError(f"model.input_encoder: 'decoder' needs a discrete model.decoders.image, but {found}")
    if input_encoder == "decoder" and "image" in encoders:
        raise ModelError("model.input_encoder: 'decoder' has no use for model.encoders.image: leave one of them out")
    if output_encoder == "encoder":
        raise ModelError(
            "model.output_encoder: an encoder's features of a whole picture would show the model what it is to draw: "
            "leave it at 'decoder'"
        )
    if encode_target and not encodes:
        raise ModelError(
            f"model.encode_target: only a discrete model.decoders.image encodes what it draws, but {found}: set it to "
            f"false"
        )


def picture_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Pixels of a side of a decoder's pictures, and their tokens."""
    decoder = _on_meta(config)
    return _attribute(decoder, "image_size"), tokens_of(decoder)


def number_of_codes(config: PreTrainedConfig) -> int:
    """Entries of a discrete decoder's codebook; 0 of any other."""
    return _attribute(_on_meta(config), "num_codes") if is_discrete(config) else 0


def tokens_of(decoder: Any) -> int:
    """Tokens of a picture."""
    return _attribute(decoder, "num_tokens")


def _attribute(decoder: Any, name: str) -> int:
    value = getattr(decoder, name, None)
    return int(getattr(decoder.config, name) if value is None else value)


def _on_meta(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return decoder_class(config)(config)


def place_codes(ids: Tensor, token_id: int, codes: Tensor) -> Tensor:
    """`ids` with `codes`, int64 [N], in place of the N tokens `token_id`."""
    return ids.masked_scatter(ids == token_id, codes)


register_decoder("flow_decoder", FlowDecoder)
register_decoder(cast(Any, JanusVQVAEConfig).model_type, VQTokenizer)
