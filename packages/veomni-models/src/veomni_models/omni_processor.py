"""The processor of an omni model: a tokenizer, processors of each modality, and how many tokens an input becomes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoVideoProcessor,
    BatchFeature,
    LlavaOnevisionVideoProcessor,
    PixtralImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.image_utils import make_flat_list_of_images
from transformers.video_utils import make_batched_videos

from veomni_models.decoders import check_encoding, decoder_configs, picture_size
from veomni_models.errors import ModelError
from veomni_models.foundation import build_tokenizer
from veomni_models.omni_config import (
    MODALITIES,
    OmniConfig,
    encoder_configs,
    is_omni_folder,
    plain_parts,
    token_counts,
)
from veomni_models.towers import BATCH_KEYS, kind_of, picture_patches, square_size

_HALF = [0.5, 0.5, 0.5]  # mean and deviation that scale pixels to -1 .. 1
_GEN_TOKENS = ("image_gen_token", "image_gen_start_token", "image_gen_end_token")
_RATE, _HOP = 16_000, 160  # samples a second, and from one log-mel frame to the next


class OmniProcessor(ProcessorMixin):
    """Called with `text`, `images`, `videos` and `audio` like any transformers processor; placeholders are expanded.

    What it gives can be concatenated along dim 0 over samples: pictures and frames of one size, patches of pictures
    with their grids, log-mel frames with their mask, or waves one after the other with their `audio_lengths`.

    Args:
        image_processor, video_processor, feature_extractor: of pictures, videos and sounds; those of a modality without
            encoder are not used.
        tokenizer: has the placeholders as single tokens.
        chat_template: Jinja source; None = the tokenizer's.
        encoders: as `OmniConfig.encoders`, from which tokens are counted.
        image_token, video_token, audio_token: stand for one picture, video or sound in a text; None = not taken.
        decoders: as `OmniConfig.decoders`, by which pictures to draw are made.
        image_gen_token, image_gen_start_token, image_gen_end_token: stand for a picture to draw, and around it.
        input_encoder: as in `OmniConfig`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        video_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        encoders: Mapping[str, Mapping[str, Any]] = {},
        image_token: str | None = None,
        video_token: str | None = None,
        audio_token: str | None = None,
        decoders: Mapping[str, Mapping[str, Any]] = {},
        image_gen_token: str | None = None,
        image_gen_start_token: str | None = None,
        image_gen_end_token: str | None = None,
        input_encoder: str = "encoder",
    ) -> None:
        self.config = OmniConfig(encoders=encoders, decoders=decoders)
        self.input_encoder = input_encoder
        self.encoders, self.decoders = plain_parts(self.config.encoders), plain_parts(self.config.decoders)
        for modality, token in zip(MODALITIES, (image_token, video_token, audio_token), strict=True):
            setattr(self, f"{modality}_token", token)
            setattr(self, f"{modality}_token_id", None if token is None else tokenizer.convert_tokens_to_ids(token))
        self.image_gen_token = image_gen_token
        self.image_gen_start_token, self.image_gen_end_token = image_gen_start_token, image_gen_end_token
        super().__init__(
            image_processor,
            video_processor,
            feature_extractor,
            tokenizer,
            chat_template=chat_template or tokenizer.chat_template,
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote."""
        # the tokenizer's loader looks up the model type of the folder
        AutoConfig.register(OmniConfig.model_type, OmniConfig, exist_ok=True)
        return super().from_pretrained(*args, **kwargs)

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """`image_token_id`, `video_token_id` and `audio_token_id`, of the modalities that are taken.

        With a decoder, also `image_gen_token_id`, `image_gen_start_token_id` and `image_gen_end_token_id`.
        """
        ids = {f"{modality}_token_id": getattr(self, f"{modality}_token_id") for modality in MODALITIES}
        for name in _GEN_TOKENS if self.decoders else ():
            ids[f"{name}_id"] = self.tokenizer.convert_tokens_to_ids(getattr(self, name))
        return {name: value for name, value in ids.items() if value is not None}

    @property
    def generation(self) -> dict[str, Any]:
        """How a picture to draw is written: `token`, which stands `tokens` times between `begin` and `end`.

        `image_processor` makes its pixels; the tokens are `learnt`, since the model counts them as targets. Empty
        without a decoder.
        """
        if not self.decoders:
            return {}
        side, tokens = picture_size(self.config.decoders["image"]["config"])
        return {
            "image_processor": SiglipImageProcessor(size={"height": side, "width": side}, do_convert_rgb=True),
            "token": self.image_gen_token,
            "tokens": tokens,
            "begin": self.image_gen_start_token,
            "end": self.image_gen_end_token,
            "learnt": True,
        }

    @property
    def model_input_names(self) -> list[str]:
        """What a model takes of the processor's output."""
        keys = [key for modality in MODALITIES if self._token(modality) for key in self._keys(modality)]
        return [*self.tokenizer.model_input_names, *keys]

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """ValueError for inputs of a modality without encoder, and for more or fewer placeholders than inputs."""
        for modality, given in zip(MODALITIES, (images, videos, audio), strict=True):
            if given is not None and self._token(modality) is None:
                raise ValueError(f"{modality} inputs were given, but the model has no {modality} encoder")
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _token(self, modality: str) -> str | None:
        token: str | None = getattr(self, f"{modality}_token")
        return token

    def _encoder(self, modality: str) -> dict[str, Any]:
        encoder: dict[str, Any] = self.config.encoders[modality]
        return self.config.encoders[encoder["share"]] if "share" in encoder else encoder

    def _keys(self, modality: str) -> list[str]:
        if modality == "image" and self.input_encoder == "decoder":
            return ["pixel_values"]
        taken = kind_of(self._encoder(modality)["config"]).inputs
        return [key for key, name in BATCH_KEYS[modality].items() if name in taken]

    def _replacements(self, modality: str, made: Mapping[str, Any], items: list[int]) -> tuple[BatchFeature, list[str]]:
        """The tensors of the batch, and what stands in the text for each item, which has so many frames."""
        encoder, names = self._encoder(modality), BATCH_KEYS[modality]
        inputs = {key: made[key] for key in self._keys(modality)}
        kind = kind_of(encoder["config"])
        counts = token_counts(encoder, kind.shapes(encoder["config"], {names[k]: v for k, v in inputs.items()}))
        token, texts = str(self._token(modality)), []
        for frames in items:
            texts.append(token * sum(counts[:frames]))
            counts = counts[frames:]
        return BatchFeature(inputs), texts

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        if self.input_encoder == "decoder":
            how, pictures = self.generation, make_flat_list_of_images(images)
            made = how["image_processor"](pictures, return_tensors="pt")
            return BatchFeature(dict(made)), [str(self.image_token) * how["tokens"]] * len(pictures)
        config = self._encoder("image")["config"]
        made = dict(self.image_processor(images, **{**kwargs, "return_tensors": "pt"}))
        if kind_of(config).name == "sizes":
            sizes = [(int(height), int(width)) for height, width in made["image_sizes"]]
            patches = picture_patches(made["pixel_values"], sizes, config.patch_size)
            made = {"pixel_values": patches["pixel_values"], "image_grid_thw": patches["grid_thw"]}
        return self._replacements("image", made, [1] * len(make_flat_list_of_images(images)))

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        if kind_of(self._encoder("video")["config"]).name == "square":
            # one by one: they have as many frames as they have
            parts = [
                self.video_processor([video], **{**_of(kwargs, i), "return_tensors": "pt"})["pixel_values_videos"][0]
                for i, video in enumerate(make_batched_videos(videos))
            ]
            return self._replacements("video", {"pixel_values_videos": torch.cat(parts)}, [len(p) for p in parts])
        made = self.video_processor(videos, **{**kwargs, "return_tensors": "pt"})
        return self._replacements("video", made, made["video_grid_thw"][:, 0].tolist())

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        extractor, rate = self.feature_extractor, kwargs.get("sampling_rate") or self.feature_extractor.sampling_rate
        if kind_of(self._encoder("audio")["config"]).name == "wave":
            # one by one: what it normalizes by is each one's own
            waves = [extractor(a, sampling_rate=rate, return_tensors="pt")["input_values"][0] for a in audio]
            made = {"input_values": torch.cat(waves), "audio_lengths": torch.tensor([len(w) for w in waves])}
        else:
            longest = max(len(a) for a in audio)
            if longest > extractor.n_samples:
                raise ValueError(
                    f"a sound of {longest / rate:.1f} s is longer than the {extractor.n_samples / rate:g} s that the "
                    f"model hears"
                )
            made = extractor(audio, sampling_rate=rate, return_attention_mask=True, return_tensors="pt")
            made = {"input_features": made["input_features"], "feature_attention_mask": made["attention_mask"]}
        return self._replacements("audio", made, [1] * len(audio))


def _of(kwargs: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Arguments of a video processor for one of the videos."""
    metadata = kwargs.get("video_metadata")
    own = {} if not isinstance(metadata, list) or len(metadata) <= index else {"video_metadata": [metadata[index]]}
    return {**kwargs, **own}


def build_omni_processor(
    tokenizer_path: str | Path | None,
    *,
    encoders: Mapping[Any, Mapping[str, Any]] = {},
    image_token: str = "<image>",
    video_token: str = "<video>",
    audio_token: str = "<audio>",
    decoders: Mapping[Any, Mapping[str, Any]] = {},
    image_gen_token: str = "<image_gen>",
    image_gen_start_token: str = "<image_gen_start>",
    image_gen_end_token: str = "<image_gen_end>",
    input_encoder: str = "encoder",
    chat_template: str | None = None,
) -> OmniProcessor:
    """The processor that fits `build_omni_model` with the same `encoders`.

    Args:
        tokenizer_path: a tokenizer's folder, or that of a saved `OmniProcessor`, which is then loaded as it is.
        encoders: as for `build_omni_model`. An encoder's folder gives its processor, if it has one; without, it is made
            to fit the encoder's config: pictures are scaled to -1 .. 1, sounds are taken at 16,000 samples a second.
        image_token, video_token, audio_token: added to the tokenizer, for each modality with an encoder, if not in it.
        decoders: as for `build_omni_model`.
        image_gen_token, image_gen_start_token, image_gen_end_token: likewise, if there are decoders.
        input_encoder: as for `build_omni_model`; pictures that the decoder reads are scaled to its size.
        chat_template: Jinja source for a tokenizer that has none.

    Raises:
        ModelError: a folder is missing, or there is no encoder and no decoder, or not the one that is to read pictures.
    """
    if tokenizer_path is None:
        raise ModelError("no tokenizer was given: set model.tokenizer_path to the folder of one")
    if is_omni_folder(tokenizer_path):
        return OmniProcessor.from_pretrained(tokenizer_path)
    tokenizer: PreTrainedTokenizerBase = build_tokenizer(tokenizer_path)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ModelError(f"{tokenizer_path}: the tokenizer has no pad_token and no eos_token: set one")
    if not encoders and not decoders:
        raise ModelError("model.encoders is empty: an omni processor needs an encoder of pictures, videos or sounds")
    configs, decoder_parts = encoder_configs(encoders), decoder_configs(decoders, None)
    check_encoding(configs, decoder_parts, input_encoder, "decoder", False)
    tokens = {"image": image_token, "video": video_token, "audio": audio_token}
    taken = {*configs, *(["image"] if input_encoder == "decoder" else [])}
    tokens = {modality: token for modality, token in tokens.items() if modality in taken}
    drawn = dict(zip(_GEN_TOKENS, (image_gen_token, image_gen_start_token, image_gen_end_token), strict=True))
    drawn = drawn if decoders else {}
    for token in [*tokens.values(), *drawn.values()]:
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:  # padding is masked, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token
    parts: dict[str, Any] = {}
    for modality in MODALITIES:
        encoder = configs.get(modality, {})
        of = encoder.get("share", modality)
        keys = encoders.get(of, {})
        folder = keys.get("config_path") or keys.get("model_path")
        parts[modality] = _modality_processor(modality, configs.get(of, {}).get("config"), folder)
    return OmniProcessor(
        parts["image"],
        parts["video"],
        parts["audio"],
        tokenizer,
        chat_template,
        plain_parts(configs),
        **{f"{modality}_token": token for modality, token in tokens.items()},
        decoders=plain_parts(decoder_parts),
        input_encoder=input_encoder,
        **drawn,
    )


def _modality_processor(modality: str, config: PreTrainedConfig | None, folder: Any) -> Any:
    """That of an encoder's folder, or one that fits its config; a plain one for a modality without encoder."""
    if config is None:
        return {
            "image": SiglipImageProcessor,
            "video": LlavaOnevisionVideoProcessor,
            "audio": WhisperFeatureExtractor,
        }[modality]()
    auto, file = {
        "image": (AutoImageProcessor, "preprocessor_config.json"),
        "video": (AutoVideoProcessor, "video_preprocessor_config.json"),
        "audio": (AutoFeatureExtractor, "preprocessor_config.json"),
    }[modality]
    if folder is not None and any((Path(folder) / name).is_file() for name in (file, "processor_config.json")):
        return auto.from_pretrained(folder)
    kind = kind_of(config).name
    if kind == "square":
        height, width = square_size(config)
        size = {"height": height, "width": width}
        if modality == "video":
            return LlavaOnevisionVideoProcessor(size=size, image_mean=_HALF, image_std=_HALF, default_to_square=True)
        return SiglipImageProcessor(size=size, do_convert_rgb=True)
    if kind == "patches":
        sizes = {name: getattr(config, name) for name in ("patch_size", "temporal_patch_size")}
        cls = Qwen2VLImageProcessor if modality == "image" else Qwen2VLVideoProcessor
        return cls(**sizes, merge_size=config.spatial_merge_size)
    if kind == "sizes":
        patch = {"height": config.patch_size, "width": config.patch_size}
        return PixtralImageProcessor(
            patch_size=patch, size={"longest_edge": config.image_size}, image_mean=_HALF, image_std=_HALF
        )
    if kind == "shapes":
        return Siglip2ImageProcessor(patch_size=config.patch_size, max_num_patches=config.num_patches)
    if kind == "wave":
        return Wav2Vec2FeatureExtractor(sampling_rate=_RATE, do_normalize=True, return_attention_mask=True)
    seconds, rest = divmod(2 * config.max_source_positions * _HOP, _RATE)
    if rest:
        raise ModelError(
            f"model.encoders.audio: max_source_positions={config.max_source_positions} is no whole number of seconds: "
            f"set it to a multiple of {_RATE // _HOP // 2}, which is one second"
        )
    return WhisperFeatureExtractor(
        feature_size=config.num_mel_bins, sampling_rate=_RATE, hop_length=_HOP, chunk_length=seconds
    )
