"""Omni models: encoders of any modality before any foundation model, as one transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from veomni_models.errors import ModelError
from veomni_models.foundation import attention_for, load_config, one_line
from veomni_models.initialization import copy_weights, initialize_weights
from veomni_models.projectors import MLPProjector

_PIXELS = {"image": "pixel_values"}  # the argument that carries a modality's inputs


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


class OmniModel(PreTrainedModel, GenerationMixin):
    """Encoders and projectors whose features replace placeholder tokens in the input of a causal language model.

    Parts: `foundation` (a *ForCausalLM), `encoders` and `projectors` (one for each modality).
    """

    config_class = OmniConfig
    base_model_prefix = "omni"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        self.foundation = AutoModelForCausalLM.from_config(
            config.text_config, attn_implementation=config._attn_implementation
        )
        self.encoders, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        for modality, encoder in config.encoders.items():
            tower, merge_size = encoder["config"], encoder["merge_size"]
            tokens_per_picture(tower, merge_size)
            self.encoders[modality] = AutoModel.from_config(tower)
            self.projectors[modality] = MLPProjector(tower.hidden_size, config.text_config.hidden_size, merge_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """What is neither foundation nor encoder keeps torch's own initialization: 0.02 cost a projector 6 points."""
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """The foundation's token embeddings."""
        return self.foundation.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the foundation's token embeddings."""
        self.foundation.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The foundation's head."""
        return self.foundation.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """The foundation without its head: what sequence parallelism slices the row for."""
        return self.foundation.get_decoder()

    def encode(self, modality: str, inputs: Tensor) -> Tensor:
        """Features of n inputs as the foundation's embeddings: pictures [n, C, S, S] -> [n * tokens, H]."""
        features = self.encoders[modality](inputs).last_hidden_state  # [n, P (+ class and register tokens first), C]
        config, merge = self.config.encoders[modality]["config"], self.config.encoders[modality]["merge_size"]
        patches = tokens_per_picture(config, merge) * merge**2
        return self.projectors[modality](features[:, -patches:]).flatten(0, 1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run encoders, put their features in place of placeholder tokens, run the foundation.

        Args:
            input_ids: int64 [B, S], with as many placeholders as the pictures have tokens, in their order.
            pixel_values: [n, C, S, S], the pictures of all rows.
            attention_mask, position_ids, past_key_values, labels, kwargs: as the foundation takes them
                (`shift_labels`, `num_items_in_batch`, `cu_seq_lens_q`, ...).
            inputs_embeds: [B, S, H] in place of input_ids, then with the features already in it.

        Returns:
            The foundation's output: `loss`, `logits`, `past_key_values`.

        Raises:
            ValueError: the number of placeholders is not the number of features.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            given = {"image": pixel_values}
            for modality in self.encoders:
                inputs_embeds = self._merge(inputs_embeds, input_ids, modality, given[modality])
        return self.foundation(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    def _merge(self, embeds: Tensor, input_ids: Tensor | None, modality: str, inputs: Tensor | None) -> Tensor:
        if inputs is None:
            if not self.training:
                return embeds
            # every rank runs every part in every step: a sharded encoder that one rank skips would hang the others
            config = self.config.encoders[modality]["config"]
            size = config.image_size
            dummy = torch.zeros(1, config.num_channels, size, size, dtype=embeds.dtype, device=embeds.device)
            return embeds + 0.0 * self.encode(modality, dummy).sum()
        features = self.encode(modality, inputs).to(embeds.dtype)
        places = (input_ids == self.config.image_token_id).unsqueeze(-1)
        if places.sum() != len(features):
            raise ValueError(
                f"{int(places.sum())} placeholder tokens in input_ids for {len(features)} features of {len(inputs)} "
                f"{modality} inputs: a picture was cut off, or its placeholders were not expanded"
            )
        return embeds.masked_scatter(places, features)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Pictures go in with the prompt; later steps find their features in the cache."""
        pixel_values, first = kwargs.pop("pixel_values", None), kwargs.get("is_first_iteration", False)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if first or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs


def register_omni_model() -> None:
    """Let transformers' Auto classes load saved omni models and their processors. Repeating it is harmless."""
    from veomni_models.omni_processor import OmniProcessor

    AutoConfig.register(OmniConfig.model_type, OmniConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.register(OmniConfig, OmniModel, exist_ok=True)
    AutoProcessor.register(OmniConfig, OmniProcessor, exist_ok=True)


def build_omni_model(
    path: str | Path | None = None,
    *,
    weights_path: str | Path | None = None,
    foundation: Mapping[str, Any] = {},
    encoders: Mapping[Any, Mapping[str, Any]] = {},
    vocab_size: int,
    image_token_id: int,
    torch_dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = "auto",
    init_device: str = "meta",
    seed: int = 0,
) -> OmniModel:
    """Assemble an omni model from its parts, or build the saved one in a folder.

    Args:
        path: config folder of the foundation model, or of a saved omni model, which then says all of its parts.
        weights_path: folder with the weights of the foundation or of the saved omni model. They (and those of encoders
            with a `model_path`) are loaded here unless `init_device` is meta; then load them when the model is sharded.
        foundation: keys of the foundation's config that replace the folder's, or make it, with `model_type`.
        encoders: for each modality the keys `config_path`, `model_path` (weights), `merge_size`, and keys of the
            encoder's config that replace the folder's, or make it, with `model_type`.
        vocab_size: length of the tokenizer; the foundation's embeddings must reach this far.
        image_token_id: the placeholder in `input_ids` that picture features replace.
        torch_dtype, attn_implementation, init_device, seed: as in `build_foundation_model`.

    Raises:
        ModelError: a folder or config cannot be used, an unknown modality, or a vocabulary that is too small.
    """
    unknown = sorted(set(encoders) - set(_PIXELS))
    if unknown:
        raise ModelError(f"model.encoders.{unknown[0]}: unknown modality, encoders are built for {sorted(_PIXELS)}")
    folder = path or weights_path
    if folder is None:
        foundation = {"vocab_size": vocab_size, **foundation}
    config = load_config(folder, foundation) if not _is_omni(folder) else OmniConfig.from_pretrained(folder)
    if not isinstance(config, OmniConfig):
        config = OmniConfig(config, {m: _encoder_config(m, keys) for m, keys in encoders.items()}, image_token_id)
    if config.text_config.vocab_size < vocab_size:
        raise ModelError(
            f"the foundation's vocab_size={config.text_config.vocab_size} is smaller than the tokenizer with its "
            f"placeholder token ({vocab_size}): raise model.foundation.vocab_size or use the tokenizer of this model"
        )
    attention = attention_for(attn_implementation)
    with torch.device("meta"):
        model = OmniModel._from_config(config, dtype=torch_dtype, attn_implementation=attention)
    if init_device != "meta":
        initialize_weights(model, seed, init_device)
        if weights_path is not None:
            saved, part = (OmniModel, model) if _is_omni(weights_path) else (AutoModelForCausalLM, model.foundation)
            copy_weights(_from_pretrained(saved, weights_path, part.config), part)
        load_encoders(model, encoders)
    return model.train()


def load_encoders(model: OmniModel, encoders: Mapping[Any, Mapping[str, Any]]) -> None:
    """Fill the encoders that have a `model_path` with its weights, by transformers' own loader.

    The model may be sharded: each rank reads the whole encoder into host memory and keeps its part.

    Raises:
        ModelError: the folder's weights cannot be read, or are not those of this encoder.
    """
    for modality, keys in encoders.items():
        if keys.get("model_path") is not None:
            encoder = model.encoders[modality]
            try:
                copy_weights(_from_pretrained(AutoModel, keys["model_path"], encoder.config), encoder)
            except ModelError as error:
                raise ModelError(f"model.encoders.{modality}: {error}") from error


def _from_pretrained(cls: Any, folder: str | Path, config: PreTrainedConfig) -> PreTrainedModel:
    """A whole model on the CPU; ModelError if the folder lacks any of its weights."""
    try:
        model, report = cls.from_pretrained(folder, config=config, output_loading_info=True)
    except Exception as error:
        raise ModelError(f"{folder}: its weights cannot be loaded: {one_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{folder} lacks {len(missing)} weights of the model, {missing[0]} among them")
    return model


def _is_omni(folder: str | Path | None) -> bool:
    if folder is None or not (Path(folder) / "config.json").is_file():
        return False
    return PreTrainedConfig.get_config_dict(folder)[0].get("model_type") == OmniConfig.model_type


def _encoder_config(modality: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """What `OmniConfig.encoders` holds for one modality, from the keys of a YAML file."""
    own = dict(keys)
    folder = own.pop("config_path", None) or own.get("model_path")
    own.pop("model_path", None)
    merge_size = own.pop("merge_size", 1)
    try:
        config = load_config(folder, own)
    except ModelError as error:
        raise ModelError(f"model.encoders.{modality}: {error}") from error
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # a pooling head would get no gradient: only patch features are used
    return {"config": config, "merge_size": merge_size}
