"""Omni models: encoders and decoders of any modality around any foundation model, as one transformers model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from veomni_models.decoders import (
    build_decoder,
    check_encoding,
    decoder_class,
    decoder_configs,
    is_discrete,
    number_of_codes,
    picture_size,
    place_codes,
)
from veomni_models.errors import ModelError
from veomni_models.foundation import attention_for, choose_experts, load_config, one_line
from veomni_models.initialization import copy_weights, initialize_weights
from veomni_models.last_states import last_states
from veomni_models.omni_config import MODALITIES, OmniConfig, encoder_configs, is_omni_folder
from veomni_models.projectors import build_projector, merge_neighbours
from veomni_models.towers import BATCH_KEYS, build_tower, kind_of, tower_class

_INPUTS = [key for modality in MODALITIES for key in BATCH_KEYS[modality]]


@dataclass
class OmniOutput(MoeCausalLMOutputWithPast):
    """The foundation's output with the parts of its loss, without gradients: they add up to `loss`."""

    losses: dict[str, Tensor] | None = None


class OmniModel(PreTrainedModel, GenerationMixin):
    """Encoders and projectors whose features replace placeholder tokens in the input of a causal language model.

    Parts: `foundation` (a *ForCausalLM), `encoders` and `projectors` (one for each modality that shares none), and
    `decoders`, which draw: the foundation predicts a discrete one's codes as tokens of its vocabulary; its states at
    the tokens of a picture are the condition of a continuous one.
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
    runs_every_tower = True
    """In training a row without pictures runs the encoder of pictures all the same; see `_merge`."""
    shared_sequence: Any = None
    """Set by whoever slices rows over ranks: `rank` and `size`; `own(x)`, this rank's part [1, T_own] of x [1, T]; and
    `gather(x)`, [n, ...] of what each rank has of it, [n_own, ...], to which gradients of all ranks come back."""

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        self.foundation = AutoModelForCausalLM.from_config(
            config.text_config, attn_implementation=config._attn_implementation
        )
        self.encoders, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        for modality, encoder in config.encoders.items():
            if "share" not in encoder:
                tower, neighbours = encoder["config"], encoder["merge_size"]
                kind = kind_of(tower)
                self.encoders[modality] = build_tower(tower)
                self.projectors[modality] = build_projector(
                    encoder["projector"],
                    kind.channels(tower) * (neighbours if modality == "audio" else neighbours**2),
                    config.text_config.hidden_size,
                )
        self.decoders = nn.ModuleDict({name: build_decoder(part["config"]) for name, part in config.decoders.items()})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """What is neither foundation nor encoder keeps torch's own initialization: 0.02 cost a projector 6 points."""
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

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

    def encode(self, modality: str, inputs: dict[str, Tensor]) -> Tensor:
        """Features of pictures, videos or sounds as the foundation's embeddings.

        Args:
            modality: `image`, `video` or `audio`.
            inputs: tensors by the names that a batch has for them, such as `pixel_values`; see `forward`.

        Returns:
            [N, H], those of one input after the other.
        """
        part = self.config.encoders[modality].get("share", modality)
        encoder, tower = self.config.encoders[part], self.encoders[part]
        config, names = encoder["config"], BATCH_KEYS[modality]
        kind = kind_of(config)
        named = {names[key]: value for key, value in inputs.items() if names[key] in kind.inputs}
        missing = set(kind.inputs) - named.keys()
        if missing:
            keys = [key for key, name in names.items() if name in missing]
            raise ValueError(
                f"a {config.model_type} encoder of {modality} inputs takes {keys} too, which are not given"
            )
        named = {key: value.to(tower.dtype) if value.is_floating_point() else value for key, value in named.items()}
        features, shapes = merge_neighbours(
            kind.features(tower, named), kind.shapes(config, named), encoder["merge_size"]
        )
        return self.projectors[part](features, [math.prod(shape) for shape in shapes])

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        noise_seed: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | OmniOutput:
        """Run encoders, put their features in place of placeholder tokens, run the foundation and decoders.

        Args:
            input_ids: int64 [B, S], with as many placeholders as the inputs have tokens, in their order.
            pixel_values: the pictures of all rows: [n, C, S, S], or patches [N, D] with `image_grid_thw` [n, 3], or
                [n, P, D] with `pixel_attention_mask` [n, P] and `spatial_shapes` [n, 2], as the encoder takes them; or
                [n, 3, S, S] in -1 .. 1 where the decoder reads them.
            pixel_values_videos: the frames of all videos: [F, C, S, S], or patches [N, D] with `video_grid_thw` [n, 3].
            input_features: log-mel frames of all sounds, [n, M, F], with `feature_attention_mask` [n, F].
            input_values: samples of all sounds, [N], with their `audio_lengths` [n].
            attention_mask, position_ids, past_key_values, labels, kwargs: as the foundation takes them
                (`shift_labels`, `num_items_in_batch`, `cu_seq_lens_q`, ...).
            inputs_embeds: [B, S, H] in place of input_ids, then with the features already in it.
            target_pixel_values: the pictures of all rows that are to be drawn, [n, 3, S, S] in -1 .. 1. `input_ids` has
                as many `image_gen_token_id` for each as the decoder has tokens. Where the labels have them too they
                count as targets: the loss is that of the codes, or the loss of the flow for each of them.
            noise_seed: with it, the noise by which a picture is learnt depends on this number and the picture alone.

        Returns:
            The foundation's output: `loss`, `logits`, `past_key_values`; in training with a continuous decoder an
            `OmniOutput`, whose `losses` are the loss of the text and that of the pictures.

        Raises:
            ValueError: the number of placeholders is not the number of features.
        """
        discrete = self._draws(discrete=True)
        flow = self._draws(discrete=False) and inputs_embeds is None and labels is not None
        if target_pixel_values is not None and not self.config.decoders:
            raise ValueError("target_pixel_values was given, but the model has no decoder of pictures")
        if discrete and (target_pixel_values is not None or self.training) and inputs_embeds is None:
            input_ids, labels, kwargs = self._with_codes(input_ids, labels, kwargs, target_pixel_values)
        places = input_ids == self.config.image_gen_token_id if flow else None
        if flow:
            labels, kwargs = self._without_pictures(labels, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed(
                input_ids,
                pixel_values=pixel_values,
                image_grid_thw=image_grid_thw,
                pixel_attention_mask=pixel_attention_mask,
                spatial_shapes=spatial_shapes,
                pixel_values_videos=pixel_values_videos,
                video_grid_thw=video_grid_thw,
                input_features=input_features,
                feature_attention_mask=feature_attention_mask,
                input_values=input_values,
                audio_lengths=audio_lengths,
            )
        with last_states(self, wanted=flow) as states:
            out: Any = self.foundation(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                **kwargs,
            )
        if places is not None and (target_pixel_values is not None or self.training):
            loss = self._flow_loss(states[0], places, target_pixel_values, noise_seed) / kwargs["num_items_in_batch"]
            parts = {"text": out.loss.detach(), "pictures": loss.detach()}
            known = {field.name for field in fields(OmniOutput)}
            kept = {key: value for key, value in out.items() if key in known}
            out = OmniOutput(**(kept | {"loss": out.loss + loss, "losses": parts}))
        return out

    def embed(self, input_ids: Tensor | None, **media: Tensor | None) -> Tensor:
        """The embeddings [B, S, H] of tokens, with features and a flow decoder's queries at their placeholders.

        Args:
            input_ids, media: as in `forward`.

        Raises:
            ValueError: the number of placeholders is not the number of features.
        """
        by_codes = self.config.input_encoder == "decoder"
        if by_codes and input_ids is not None:
            input_ids = self._read_as_codes(input_ids, media.get("pixel_values"))
        embeds = self._embed_tokens(input_ids)
        for modality in MODALITIES:
            inputs = {key: value for key in BATCH_KEYS[modality] if (value := media.get(key)) is not None}
            if modality == "image" and by_codes:
                continue
            if modality in self.config.encoders:
                embeds = self._merge(embeds, input_ids, modality, inputs)
            elif inputs:
                raise ValueError(f"{next(iter(inputs))} was given, but the model has no {modality} encoder")
        return embeds

    def _draws(self, *, discrete: bool) -> bool:
        return any(is_discrete(part["config"]) == discrete for part in self.config.decoders.values())

    def _embed_tokens(self, input_ids: Tensor | None) -> Tensor:
        """[B, S, H], with a flow decoder's queries at the tokens of the pictures that it draws."""
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        if input_ids is None or not self._draws(discrete=False):
            return embeds
        queries = self.decoders["image"].queries.to(embeds.dtype)
        places = input_ids == self.config.image_gen_token_id
        pictures, rest = divmod(int(places.sum()), len(queries))
        if rest:
            raise ValueError(
                f"{int(places.sum())} tokens of pictures to draw in input_ids, which are {len(queries)} for each: one "
                f"was cut off"
            )
        if not pictures:
            return embeds + 0.0 * queries.sum() if self.training else embeds
        return embeds.masked_scatter(places.unsqueeze(-1), queries.repeat(pictures, 1))

    def _with_codes(
        self, input_ids: Any, labels: Tensor | None, kwargs: dict[str, Any], pictures: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """A batch with the codes of its pictures, as tokens of the vocabulary, in place of their placeholders."""
        tokenizer, token_id = self.decoders["image"], self.config.image_gen_token_id
        if pictures is None:
            tokenizer.codes(self._blank_picture(input_ids.device))  # every rank runs every part
            return input_ids, labels, kwargs
        coded = self._place_codes(input_ids, token_id, pictures, "target_pixel_values")

        def own(targets: Tensor | None, tokens: Tensor) -> Tensor | None:
            if targets is None:
                return None
            if targets.shape != tokens.shape:
                tokens = self.shared_sequence.own(tokens)
            return torch.where(targets == token_id, tokens, targets)

        if "shift_labels" in kwargs:
            kwargs = {**kwargs, "shift_labels": own(kwargs["shift_labels"], coded.roll(-1, dims=-1))}
        return coded, own(labels, coded), kwargs

    def _read_as_codes(self, input_ids: Tensor, pictures: Tensor | None) -> Tensor:
        """`input_ids` with the codes of pictures that are read, as tokens of the vocabulary, at their placeholders."""
        if pictures is None:
            if self.training:
                self.decoders["image"].codes(self._blank_picture(input_ids.device))  # every rank runs every part
            return input_ids
        return self._place_codes(input_ids, self.config.image_token_id, pictures, "pixel_values")

    def _place_codes(self, input_ids: Tensor, token_id: int, pictures: Tensor, key: str) -> Tensor:
        codes = self.decoders["image"].codes(pictures).flatten() + self.config.first_code_id
        self._check_places(input_ids == token_id, len(pictures), key)
        return place_codes(input_ids, token_id, codes)

    def _without_pictures(self, labels: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """Labels of the text alone, with the number of all targets, which those of pictures are among."""
        token_id, kwargs = self.config.image_gen_token_id, dict(kwargs)
        shifted = kwargs.get("shift_labels")
        if kwargs.get("num_items_in_batch") is None:
            targets = shifted if shifted is not None else torch.as_tensor(labels)[:, 1:]
            kwargs["num_items_in_batch"] = (targets != -100).sum()
        if shifted is not None:
            kwargs["shift_labels"] = shifted.masked_fill(shifted == token_id, -100)
        return None if labels is None else labels.masked_fill(labels == token_id, -100), kwargs

    def _check_places(self, places: Tensor, pictures: int, key: str = "target_pixel_values") -> None:
        wanted = pictures * picture_size(self.config.decoders["image"]["config"])[1]
        if int(places.sum()) != wanted:
            raise ValueError(
                f"{int(places.sum())} tokens of pictures to {'draw' if key == 'target_pixel_values' else 'read'} in "
                f"input_ids for {pictures} pictures of {key}, which have {wanted}"
            )

    def _flow_loss(self, states: Tensor, places: Tensor, pictures: Tensor | None, seed: int | None) -> Tensor:
        """The loss of the pictures of all rows, each as often as it has tokens; of this rank's if ranks share a row.

        Args:
            states: [B, S, H] of the foundation, of this rank's part of a row.
            places: bool [B, T], the tokens of pictures in whole rows.
            pictures: [n, 3, S, S], or None for the same computation without effect.
        """
        decoder, config, weight = self.decoders["image"], self.config.decoders["image"]["config"], 1.0
        if pictures is None:
            condition, weight = states[:1, :1].expand(1, config.num_tokens, -1), 0.0
            pictures = self._blank_picture(states.device)
        else:
            self._check_places(places, len(pictures))
            shared = self.shared_sequence
            if states.shape[:2] == places.shape:
                condition = states[places].view(len(pictures), config.num_tokens, -1)
            else:
                condition = shared.gather(states[shared.own(places)]).view(len(pictures), config.num_tokens, -1)
                mine = slice(shared.rank, None, shared.size)
                if len(pictures) <= shared.rank:  # nothing to do here, but sharded parts run on every rank
                    mine, weight = slice(0, 1), 0.0
                condition, pictures = condition[mine], pictures[mine]
        losses: Tensor = decoder.loss(condition, pictures, seed)
        return weight * config.loss_weight * config.num_tokens * losses.sum()

    def _blank_picture(self, device: torch.device) -> Tensor:
        side, _ = picture_size(self.config.decoders["image"]["config"])
        return torch.zeros(1, 3, side, side, device=device)

    def _merge(self, embeds: Tensor, input_ids: Tensor | None, modality: str, inputs: dict[str, Tensor]) -> Tensor:
        if not inputs:
            if not self.training:
                return embeds
            # every rank runs every part in every step: a sharded encoder that one rank skips would hang the others
            blank = self._blank(modality, embeds.device)
            return embeds + 0.0 * self.encode(modality, blank).sum().to(embeds.dtype)
        features = self.encode(modality, inputs).to(embeds.dtype)
        places = (input_ids == getattr(self.config, f"{modality}_token_id")).unsqueeze(-1)
        if places.sum() != len(features):
            raise ValueError(
                f"{int(places.sum())} placeholder tokens in input_ids for {len(features)} features of "
                f"{_count(inputs)} {modality} inputs: one was cut off, or its placeholders were not expanded"
            )
        return embeds.masked_scatter(places, features)

    def _blank(self, modality: str, device: torch.device) -> dict[str, Tensor]:
        config = self.config.encoders[self.config.encoders[modality].get("share", modality)]["config"]
        keys = {name: key for key, name in BATCH_KEYS[modality].items()}
        return {keys[name]: value.to(device) for name, value in kind_of(config).blank(config).items()}

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Pictures and sounds go in with the prompt; later steps find their features in the cache."""
        media = {key: kwargs.pop(key) for key in _INPUTS if key in kwargs}
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True):
            inputs |= media
        return inputs


def _count(inputs: dict[str, Tensor]) -> int:
    """How many pictures, frames or sounds there are, or videos with a grid."""
    last: Tensor = [*inputs.values()][-1]
    return len(last)


def build_omni_model(
    path: str | Path | None = None,
    *,
    weights_path: str | Path | None = None,
    foundation: Mapping[str, Any] = {},
    encoders: Mapping[Any, Mapping[str, Any]] = {},
    decoders: Mapping[Any, Mapping[str, Any]] = {},
    vocab_size: int,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    audio_token_id: int | None = None,
    image_gen_token_id: int | None = None,
    image_gen_start_token_id: int | None = None,
    image_gen_end_token_id: int | None = None,
    input_encoder: str = "encoder",
    output_encoder: str = "decoder",
    encode_target: bool = False,
    torch_dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = "auto",
    moe_implementation: str | None = "auto",
    init_device: str = "meta",
    seed: int = 0,
) -> OmniModel:
    """Assemble an omni model from its parts, or build the saved one in a folder.

    Args:
        path: config folder of the foundation model, or of a saved omni model, which then says all of its parts.
        weights_path: folder with the weights of the foundation or of the saved omni model. They (and those of encoders
            and decoders with a `model_path`) are loaded here unless `init_device` is meta; then load them when the
            model is sharded.
        foundation: keys of the foundation's config that replace the folder's, or make it, with `model_type`.
        encoders: for each modality (`image`, `video`, `audio`) the keys `config_path`, `model_path` (weights),
            `merge_size`, `projector` (a name, or its `type` with options), and keys of the encoder's config that
            replace the folder's, or make it, with `model_type`. `video: {share: image}` needs no encoder of its own.
        decoders: for `image` the keys `config_path`, `model_path` (weights), `guidance_scale`, `temperature` and
            `num_steps` (see `DrawingOptions`), and keys of the decoder's config: one of `register_decoder`,
            `flow_decoder` or `janus_vqgan`. A discrete one's codes are added to the vocabulary.
        vocab_size: length of the tokenizer; embeddings of the foundation that are fewer are made to reach this far.
        image_token_id, video_token_id, audio_token_id: the placeholders in `input_ids` that features replace; each
            modality with an encoder needs its own.
        image_gen_token_id, image_gen_start_token_id, image_gen_end_token_id: the placeholder of pictures to draw, and
            what stands around them; needed with a decoder.
        input_encoder: what turns pictures that are read into tokens: `encoder`, or `decoder`: a discrete decoder, whose
            codes then stand for them as for those that are drawn.
        output_encoder: what turns pictures that are to be drawn into targets: `decoder`.
        encode_target: a discrete decoder always encodes what is to be drawn; true makes sure that there is one.
        torch_dtype, attn_implementation, moe_implementation, init_device, seed: as in `build_foundation_model`.

    Raises:
        ModelError: a folder or config cannot be used, an unknown modality, a vocabulary that is too small, or parts
            that cannot encode pictures as they are to.
    """
    folder = path or weights_path
    if folder is None:
        foundation = {"vocab_size": vocab_size, **foundation}
    config = load_config(folder, foundation) if not is_omni_folder(folder) else OmniConfig.from_pretrained(folder)
    if not isinstance(config, OmniConfig):
        config = OmniConfig(
            config,
            encoder_configs(encoders),
            image_token_id,
            video_token_id,
            audio_token_id,
            decoder_configs(decoders, config.get_text_config().hidden_size),
            image_gen_token_id,
            image_gen_start_token_id,
            image_gen_end_token_id,
            input_encoder=input_encoder,
        )
    check_encoding(config.encoders, config.decoders, config.input_encoder, output_encoder, encode_target)
    for modality in config.encoders:
        if getattr(config, f"{modality}_token_id") is None:
            raise ModelError(f"model.encoders.{modality}: no {modality}_token_id was given, which it is to replace")
    if config.input_encoder == "decoder" and config.image_token_id is None:
        raise ModelError("model.input_encoder: no image_token_id was given, which the codes are to replace")
    if config.decoders and None in (config.image_gen_token_id, config.image_gen_start_token_id):
        raise ModelError("model.decoders.image: no image_gen_token_id and image_gen_start_token_id were given")
    own_vocab_size = config.text_config.vocab_size
    if own_vocab_size < vocab_size:
        small = f"the foundation's vocab_size={own_vocab_size} is smaller than the tokenizer with its placeholder token"
        if "vocab_size" in foundation:
            raise ModelError(f"{small}: set model.foundation.vocab_size to {vocab_size} or leave it out")
        if weights_path is not None and init_device == "meta":
            raise ModelError(f"{small} ({vocab_size}): set train.init_device to cpu, which makes it fit")
        config.text_config.vocab_size = vocab_size
    codes = sum(number_of_codes(decoder["config"]) for decoder in config.decoders.values())
    if codes and config.first_code_id is None:
        if weights_path is not None and init_device == "meta":
            raise ModelError("the codes of model.decoders.image widen the vocabulary: set train.init_device to cpu")
        config.first_code_id = config.text_config.vocab_size
        vocab_size = config.text_config.vocab_size = config.first_code_id + codes
    attention = attention_for(attn_implementation)
    with torch.device("meta"):
        model = OmniModel._from_config(config, dtype=torch_dtype, attn_implementation=attention)
    choose_experts(model.foundation, moe_implementation)
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
        load_decoders(model, decoders)
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
                copy_weights(_pretrained_tower(keys["model_path"], encoder.config), encoder)
            except ModelError as error:
                raise ModelError(f"model.encoders.{modality}: {error}") from error


def load_decoders(model: OmniModel, decoders: Mapping[Any, Mapping[str, Any]]) -> None:
    """Fill the decoders that have a `model_path` with its weights; as `load_encoders`.

    Raises:
        ModelError: the folder's weights cannot be read, or are not those of this decoder.
    """
    for modality, keys in decoders.items():
        if keys.get("model_path") is not None:
            decoder = model.decoders[modality]
            try:
                copy_weights(_pretrained_decoder(keys["model_path"], decoder.config), decoder)
            except ModelError as error:
                raise ModelError(f"model.decoders.{modality}: {error}") from error


def _pretrained_decoder(folder: str | Path, config: PreTrainedConfig) -> nn.Module:
    """A decoder with its weights on the CPU, from a folder of its own or of a model that it is a part of."""
    whole, wanted = load_config(folder), decoder_class(config)
    if whole.model_type == config.model_type:
        return _from_pretrained(wanted, folder, config)
    model = _from_pretrained(AutoModel, folder, whole)
    kinds = {getattr(getattr(m, "config", None), "model_type", None): m for m in model.modules()}
    found = kinds.get(config.model_type)
    if found is None:
        raise ModelError(f"{folder} holds a {whole.model_type} model, which has no {config.model_type} in it")
    return found


def _pretrained_tower(folder: str | Path, config: PreTrainedConfig) -> nn.Module:
    """A tower with its weights on the CPU, from a folder of its own or of a model that it is a part of."""
    wanted = tower_class(config)
    whole = load_config(folder)
    if MODEL_MAPPING.get(type(whole), None) is wanted:
        return _from_pretrained(wanted, folder, config)
    model = _from_pretrained(AutoModel, folder, whole)
    tower = next((module for module in model.modules() if type(module) is wanted), None)
    if tower is None:
        raise ModelError(f"{folder} holds a {whole.model_type} model, which has no {wanted.__name__} in it")
    return tower


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
