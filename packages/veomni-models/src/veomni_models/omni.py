"""Omni models: encoders of any modality before any foundation model, as one transformers model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from veomni_models.errors import ModelError
from veomni_models.foundation import attention_for, load_config, one_line
from veomni_models.initialization import copy_weights, initialize_weights
from veomni_models.omni_config import OmniConfig, encoder_config, is_omni_folder, tokens_per_picture
from veomni_models.projectors import MLPProjector

_MODALITIES = ("image",)  # that `OmniModel.forward` takes inputs of


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
        vocab_size: length of the tokenizer; embeddings of the foundation that are fewer are made to reach this far.
        image_token_id: the placeholder in `input_ids` that picture features replace.
        torch_dtype, attn_implementation, init_device, seed: as in `build_foundation_model`.

    Raises:
        ModelError: a folder or config cannot be used, an unknown modality, or a vocabulary that is too small.
    """
    unknown = sorted(set(encoders) - set(_MODALITIES))
    if unknown:
        raise ModelError(f"model.encoders.{unknown[0]}: unknown modality, encoders are built for {sorted(_MODALITIES)}")
    folder = path or weights_path
    if folder is None:
        foundation = {"vocab_size": vocab_size, **foundation}
    config = load_config(folder, foundation) if not is_omni_folder(folder) else OmniConfig.from_pretrained(folder)
    if not isinstance(config, OmniConfig):
        config = OmniConfig(config, {m: encoder_config(m, keys) for m, keys in encoders.items()}, image_token_id)
    own_vocab_size = config.text_config.vocab_size
    if own_vocab_size < vocab_size:
        small = f"the foundation's vocab_size={own_vocab_size} is smaller than the tokenizer with its placeholder token"
        if "vocab_size" in foundation:
            raise ModelError(f"{small}: set model.foundation.vocab_size to {vocab_size} or leave it out")
        if weights_path is not None and init_device == "meta":
            raise ModelError(f"{small} ({vocab_size}): set train.init_device to cpu, which makes it fit")
        config.text_config.vocab_size = vocab_size
    attention = attention_for(attn_implementation)
    with torch.device("meta"):
        model = OmniModel._from_config(config, dtype=torch_dtype, attn_implementation=attention)
    if init_device != "meta":
        initialize_weights(model, seed, init_device)
        if weights_path is not None:
            whole = is_omni_folder(weights_path)
            part, cls = (model, OmniModel) if whole else (model.foundation, AutoModelForCausalLM)
            part_config = copy.deepcopy(part.config)
            part_config.get_text_config().vocab_size = own_vocab_size
            saved = _from_pretrained(cls, weights_path, part_config)
            if own_vocab_size < vocab_size:
                saved.resize_token_embeddings(vocab_size)
            copy_weights(saved, part)
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
