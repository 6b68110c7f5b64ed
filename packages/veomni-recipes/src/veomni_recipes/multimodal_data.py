"""What a configuration says about conversations with pictures, videos and sounds, and the model that reads them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from veomni_config import ConfigError, ModelConfig, Problem, VLDataConfig
from veomni_data import Sample, encode_multimodal_sample, get_chat_template, multimodal_prompt
from veomni_models import build_foundation_model, build_processor, load_config

from veomni_recipes.evaluation import prompt_options
from veomni_recipes.training_data import media_limits

_TOKENS = {
    "image_token_id": ("image_token",),
    "video_token_id": ("video_token",),
    "audio_token_id": ("audio_token",),
    "vision_start_token_id": ("vision_start_token", "vision_bos_token"),
    "vision_end_token_id": ("vision_end_token", "vision_eos_token"),
    "audio_start_token_id": ("audio_bos_token",),
    "audio_end_token_id": ("audio_eos_token",),
}
"""Keys of a model's config, and what processors and their tokenizers call the tokens that they number."""

_ARGUMENTS = {
    "input_ids": lambda sample: sample["input_ids"][None],
    "attention_mask": lambda sample: torch.ones_like(sample["input_ids"])[None],
    "mm_token_type_ids": lambda sample: sample.get("mm_token_type_ids", torch.zeros_like(sample["input_ids"]))[None],
    "image_grid_thw": lambda sample: sample.get("image_grid_thw"),
    "video_grid_thw": lambda sample: sample.get("video_grid_thw"),
    "second_per_grid_ts": lambda sample: _tensor(sample.get("second_per_grid_ts")),
    "second_per_grids": lambda sample: _tensor(sample.get("video_second_per_grid")),
    "audio_seqlens": lambda sample: (
        mask.sum(-1) if (mask := sample.get("feature_attention_mask")) is not None else None
    ),
}
"""What `get_rope_index` of a model is called with, of a sample."""


def _tensor(value: Any) -> Tensor | None:
    return None if value is None else torch.as_tensor(value)


def open_processor(model: ModelConfig) -> Any:
    """The model's own processor, of the folder that the configuration names.

    Raises:
        ConfigError: it names none, or one without a processor of pictures.
        ModelError: the folder does not exist, or cannot be read.
    """
    if model.tokenizer_path is None:
        text = "there is no folder to take the processor from: set it, model.config_path or model.model_path"
        raise ConfigError([Problem("model.tokenizer_path", text)])
    processor = build_processor(model.tokenizer_path)
    if not hasattr(processor, "tokenizer") or getattr(processor, "image_token", None) is None:
        text = f"{model.tokenizer_path} holds no processor of pictures: name a folder that the model's processor saved"
        raise ConfigError([Problem("model.tokenizer_path", text)])
    return processor


def multimodal_config(model: ModelConfig, processor: Any) -> Any:
    """The config of the model: of an omni model that speaks, that of the thinker, which reads, hears and writes.

    One that is made of the configuration's keys alone gets the processor's placeholder tokens and vocabulary.

    Raises:
        ConfigError: the model's placeholder tokens are others than the processor's.
        ModelError: see `load_config`.
    """
    tokenizer, keys, named = processor.tokenizer, dict(model.foundation), _token_ids(processor)
    path = model.config_path or model.model_path
    if path is not None:
        config = load_config(path, keys)
        config = getattr(config, "thinker_config", config)
        for key, (token, number) in named.items():
            if (known := getattr(config, key, None)) is not None and known != number:
                text = f'{path} has {key}={known}, but the processor has {number} for "{token}": name one that fits it'
                raise ConfigError([Problem("model.tokenizer_path", text)])
        return config
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    keys["text_config"] = {"vocab_size": len(tokenizer), **ends, **keys.get("text_config", {})}
    config = load_config(None, keys)
    set_token_ids(config, processor, but=keys)
    return config


def set_token_ids(config: Any, processor: Any, but: Container[str] = ()) -> None:
    """Give a model's config the numbers of the processor's placeholder tokens.

    Args:
        config: changed in place.
        processor: of the model.
        but: keys that are left as they are.
    """
    for key, (_, number) in _token_ids(processor).items():
        if key not in but:
            setattr(config, key, number)


def _token_ids(processor: Any) -> dict[str, tuple[str, int]]:
    """Keys of a config to a placeholder token of the processor and its number."""
    tokenizer = processor.tokenizer
    named = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    for key, names in _TOKENS.items():
        for owner, name in product((processor, tokenizer), names):
            if (token := getattr(owner, name, None)) is not None:
                named[key] = token
    return {key: (token, tokenizer.convert_tokens_to_ids(token)) for key, token in named.items()}


def multimodal_transform(data: VLDataConfig, processor: Any, config: Any) -> Callable[[Mapping[str, Any]], Sample]:
    """Conversation -> sample, with the positions of the model's own function.

    The processor gets the chat template, to be exported with the model.

    Args:
        data: of the configuration.
        processor: of the model.
        config: of the model.
    """
    return partial(
        encode_multimodal_sample,
        processor=processor,
        template=_template(data, processor),
        max_image_nums=data.max_image_nums,
        position_ids=rope_positions(config),
        **_columns(data),
        **media_limits(data),
    )


def multimodal_prompts(data: VLDataConfig, processor: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Conversation -> prompt of its last answer, with that answer."""
    own = getattr(getattr(processor, "video_processor", None), "fps", None)
    return partial(
        multimodal_prompt,
        template=_template(data, processor),
        **prompt_options(processor),
        **_columns(data),
        **({"fps": own} if own else {}) | media_limits(data),
    )


def _template(data: VLDataConfig, processor: Any) -> Any:
    if own := getattr(processor, "chat_template", None):
        processor.tokenizer.chat_template = own
    template = get_chat_template(data.chat_template, processor.tokenizer)
    processor.tokenizer.chat_template = processor.chat_template = template.source
    return template


def _columns(data: VLDataConfig) -> dict[str, Any]:
    return {"text_keys": data.text_keys, "image_keys": data.image_keys, "columns": data.columns or None}


def rope_positions(config: Any) -> Callable[[Sample], Tensor] | None:
    """Sample -> its positions [3, T] for M-RoPE, by the model's `get_rope_index`; None for a model that has none."""
    positions = RopePositions(config)
    return positions if positions.function is not None else None


@dataclass(frozen=True)
class RopePositions:
    """The positions of a model, whose function is found again in each worker process.

    Attributes:
        config: of the model.
    """

    config: Any

    def __call__(self, sample: Sample) -> Tensor:
        """[3, 1, T]: time, height and width of each token; int64, or float32 where frames lie between two positions."""
        function, names = self.function or (None, ())
        assert function is not None
        given = {name: _ARGUMENTS[name](sample) for name in names}
        positions: Tensor = function(**{name: value for name, value in given.items() if value is not None})[0]
        return positions

    @cached_property
    def function(self) -> tuple[Callable[..., Any], list[str]] | None:
        """The bound method of a model on meta of one layer, and the arguments that it takes of a sample."""
        model = build_foundation_model(_shallow(self.config))
        owner = model if hasattr(model, "get_rope_index") else model.base_model
        function = getattr(owner, "get_rope_index", None)
        return function and (function, [name for name in inspect.signature(function).parameters if name in _ARGUMENTS])

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}


def _shallow(config: Any) -> Any:
    """The config of a model of one layer: positions do not depend on layers."""
    config = copy.deepcopy(config)
    parts = [config, *(part for name in type(config).sub_configs or {} if (part := getattr(config, name, None)))]
    for part in parts:
        for key in ("num_hidden_layers", "depth", "encoder_layers"):
            if hasattr(part, key):
                setattr(part, key, 1)
    return config
