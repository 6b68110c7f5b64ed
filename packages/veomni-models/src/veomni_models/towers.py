"""Vision and audio towers of transformers: what each kind is called with, and which features it gives.

A kind is read off the arguments of a tower's forward, so that a tower released tomorrow is of one of these kinds:

- `square`: pictures (or frames) of one size, `pixel_values` [n, C, S, S] (CLIP, SigLIP, DINOv2, ViT, Swin, ConvNeXt);
- `patches`: pictures and videos of any size as rows of patches, with `grid_thw` [n, 3] (Qwen-VL, GLM-V);
- `sizes`: pictures of any size, padded, with their `image_sizes` (Pixtral);
- `shapes`: pictures of any size as padded patches, with their `spatial_shapes` (SigLIP2);
- `mel`: log-mel frames of sounds, padded to one length, `input_features` [n, M, F] (Whisper, Qwen2-Audio, Voxtral);
- `wave`: sounds as they are, `input_values` (wav2vec 2.0, HuBERT, WavLM).
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from veomni_models.errors import ModelError

Inputs = dict[str, Tensor]
Shape = tuple[int, ...]

BATCH_KEYS = {
    "image": {
        "pixel_values": "pixel_values",
        "image_grid_thw": "grid_thw",
        "pixel_attention_mask": "pixel_attention_mask",
        "spatial_shapes": "spatial_shapes",
    },
    "video": {"pixel_values_videos": "pixel_values", "video_grid_thw": "grid_thw"},
    "audio": {
        "input_features": "input_features",
        "feature_attention_mask": "frame_mask",
        "input_values": "input_values",
        "audio_lengths": "lengths",
    },
}
"""For each modality, names in a batch to the names by which a kind of tower takes them."""


@dataclass(frozen=True)
class Kind:
    """What the towers of a kind have in common; each is called with tensors under the names of `BATCH_KEYS`.

    Attributes:
        name: see above.
        modalities: which it can encode.
        inputs: the tensors that it takes, the main one first.
        shapes: how many features each picture, frame or sound has: (height, width) or (length,).
        features: [N, C] of all of them, one after the other.
        channels: C.
        blank: inputs of one picture or sound without content, in float32 on the CPU.
    """

    name: str
    modalities: tuple[str, ...]
    inputs: tuple[str, ...]
    shapes: Callable[[PreTrainedConfig, Inputs], list[Shape]]
    features: Callable[[Any, Inputs], Tensor]
    channels: Callable[[PreTrainedConfig], int]
    blank: Callable[[PreTrainedConfig], Inputs]


def tower_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that a config is of; of a model that also decodes, its encoder.

    Raises:
        ModelError: transformers has no model for it.
    """
    if config.model_type == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return cast(type[PreTrainedModel], WhisperEncoder)
    try:
        found = MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise ModelError(
            f"encoder {config.model_type!r}: transformers has no model that AutoModel builds from this config alone"
        ) from error
    return cast(type[PreTrainedModel], found[0] if isinstance(found, tuple) else found)


def kind_of(config: PreTrainedConfig) -> Kind:
    """The kind of tower that a config is of.

    Raises:
        ModelError: it is no tower, or of a kind that is not among these.
    """
    cls = tower_class(config)
    names = list(inspect.signature(cls.forward).parameters)[1:]
    for argument, name in (("grid_thw", "patches"), ("image_sizes", "sizes"), ("spatial_shapes", "shapes")):
        if argument in names:
            return KINDS[name]
    if names[0] == "pixel_values":
        return KINDS["square"]
    if names[0] == "input_features" and hasattr(config, "max_source_positions"):
        return KINDS["mel"]
    if names[0] == "input_values" and hasattr(config, "conv_kernel"):
        return KINDS["wave"]
    raise ModelError(
        f"encoder {config.model_type!r}: {cls.__name__} takes {', '.join(names[:3])}, which is no tower of pictures "
        f"(pixel_values), of log-mel frames of a fixed length (input_features) or of waves (input_values)"
    )


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with random weights, without parts whose output nobody takes."""
    cls = tower_class(config)
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls.__init__).parameters else {}
    tower = cls._from_config(config, **options)
    if getattr(config, "feat_extract_norm", None) == "group":
        extractor = cast(Any, tower).feature_extractor
        layers = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        extractor.forward = functools.partial(_each_wave_alone, type(extractor).forward, extractor, layers)
    return cast(PreTrainedModel, tower)


def without_randomness(config: PreTrainedConfig, given: Any) -> None:
    """Switch off what a tower does at random in training, but for dropout, unless it is among the keys `given`.

    A layer that one rank drops and another does not would leave a sharded tower waiting; a mask of ten frames does not
    fit a short sound; positions that are stretched at random (DINOv3) are for the training of the tower alone; and a
    pooling head would get no gradient.
    """
    for key, value in (
        ("layerdrop", 0.0),
        ("encoder_layerdrop", 0.0),
        ("apply_spec_augment", False),
        ("pos_embed_rescale", None),
        ("vision_use_head", False),
        ("use_head", False),
    ):
        if key not in given and hasattr(config, key):
            setattr(config, key, value)


def _on_meta(config: PreTrainedConfig) -> Any:
    """The tower without storage, by which shapes are found out."""
    return _tower_on_meta(_text(config))


def _text(config: PreTrainedConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


@lru_cache(maxsize=16)
def _tower_on_meta(text: str) -> Any:
    keys = json.loads(text)
    with torch.device("meta"):
        return build_tower(AutoConfig.for_model(keys.pop("model_type"), **keys)).eval()


def _sides(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def square_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width in pixels of the pictures of a `square` tower; ModelError if its config does not say them."""
    size = getattr(config, "image_size", None)
    if not isinstance(size, int | list | tuple):
        raise ModelError(f"encoder {config.model_type!r} has no image_size: set it to the pixels of a side")
    return _sides(size)


@torch.no_grad()
def square_grid(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Height and width of the grid of features that a `square` tower makes of a picture, and their channels.

    They are read off what the tower gives for a picture on the meta device.

    Raises:
        ModelError: its features are no grid.
    """
    return _square_grid(_text(config), square_size(config))


@lru_cache(maxsize=16)
def _square_grid(text: str, size: tuple[int, int]) -> tuple[int, int, int]:
    tower = _tower_on_meta(text)
    channels = getattr(tower.config, "num_channels", None) or 3
    try:
        out = tower(torch.zeros(1, channels, *size, device="meta")).last_hidden_state
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise ModelError(
            f"encoder {tower.config.model_type!r} takes no picture of {size[0]} x {size[1]} pixels: {lines[0]}"
        ) from error
    if out.ndim == 4:  # [1, C, h, w]
        return out.shape[2], out.shape[3], out.shape[1]
    patch = getattr(tower.config, "patch_size", None)
    if patch is not None and not hasattr(tower.config, "depths"):
        height, width = (side // p for side, p in zip(size, _sides(patch), strict=True))
    else:
        height = width = math.isqrt(out.shape[1])
    if not 0 < height * width <= out.shape[1]:
        raise ModelError(f"encoder {tower.config.model_type!r} gives {out.shape[1]} features, which are no square grid")
    return height, width, out.shape[2]


def _square_shapes(config: PreTrainedConfig, inputs: Inputs) -> list[Shape]:
    return [square_grid(config)[:2]] * len(inputs["pixel_values"])


def _square_features(tower: Any, inputs: Inputs) -> Tensor:
    height, width, _ = square_grid(tower.config)
    features = tower(pixel_values=inputs["pixel_values"]).last_hidden_state
    if features.ndim == 4:
        features = features.flatten(2).transpose(1, 2)
    return features[:, -height * width :].flatten(0, 1)  # class and register tokens come first


def _square_blank(config: PreTrainedConfig) -> Inputs:
    return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", None) or 3, *square_size(config))}


def patch_pixels(config: PreTrainedConfig) -> int:
    """Numbers in one row of `pixel_values` of a tower of the kinds `patches`, `sizes` or `shapes`."""
    channels = next(
        (c for name in ("num_channels", "in_channels", "in_chans") if (c := getattr(config, name, None))), 3
    )
    return int(channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2)


def _patches_shapes(config: PreTrainedConfig, inputs: Inputs) -> list[Shape]:
    m = config.spatial_merge_size
    return [(h // m, w // m) for t, h, w in inputs["grid_thw"].tolist() for _ in range(t)]


def _patches_features(tower: Any, inputs: Inputs) -> Tensor:
    return cast(Tensor, tower(inputs["pixel_values"], grid_thw=inputs["grid_thw"]).pooler_output)


def _patches_blank(config: PreTrainedConfig) -> Inputs:
    m = config.spatial_merge_size
    return {"pixel_values": torch.zeros(m * m, patch_pixels(config)), "grid_thw": torch.tensor([[1, m, m]])}


def _sizes_shapes(config: PreTrainedConfig, inputs: Inputs) -> list[Shape]:
    return [(h, w) for _, h, w in inputs["grid_thw"].tolist()]


def _sizes_features(tower: Any, inputs: Inputs) -> Tensor:
    config, shapes = tower.config, _sizes_shapes(tower.config, inputs)
    p, c = config.patch_size, config.num_channels
    high, wide = max(h for h, _ in shapes), max(w for _, w in shapes)
    pictures = [
        F.pad(rows.view(h, w, c, p, p).permute(2, 0, 3, 1, 4).reshape(c, h * p, w * p), _to(h, w, high, wide, p))
        for rows, (h, w) in zip(inputs["pixel_values"].split([h * w for h, w in shapes]), shapes, strict=True)
    ]
    sizes = torch.tensor([(h * p, w * p) for h, w in shapes], device=pictures[0].device)
    return cast(Tensor, tower(torch.stack(pictures), image_sizes=sizes).last_hidden_state[0])


def _to(h: int, w: int, high: int, wide: int, p: int) -> tuple[int, int, int, int]:
    return (0, (wide - w) * p, 0, (high - h) * p)


def picture_patches(pictures: Tensor, sizes: list[tuple[int, int]], patch: int) -> Inputs:
    """Padded pictures [n, C, H, W] of these sizes as rows of patches, by which they can be joined with others.

    Returns:
        `pixel_values` [patches of all, C * patch^2] and `grid_thw` [n, 3].
    """
    rows = [
        picture[:, :height, :width].unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).flatten(2)
        for picture, (height, width) in zip(pictures, sizes, strict=True)
    ]  # [h, w, C * p * p]
    grids = [[1, *row.shape[:2]] for row in rows]
    return {"pixel_values": torch.cat([row.flatten(0, 1) for row in rows]), "grid_thw": torch.tensor(grids)}


def _sizes_blank(config: PreTrainedConfig) -> Inputs:
    return {"pixel_values": torch.zeros(1, patch_pixels(config)), "grid_thw": torch.tensor([[1, 1, 1]])}


def _shapes_shapes(config: PreTrainedConfig, inputs: Inputs) -> list[Shape]:
    return [(h, w) for h, w in inputs["spatial_shapes"].tolist()]


def _shapes_features(tower: Any, inputs: Inputs) -> Tensor:
    features = tower(**inputs).last_hidden_state  # [n, most patches, C]
    return cast(Tensor, features[inputs["pixel_attention_mask"].bool()])


def _shapes_blank(config: PreTrainedConfig) -> Inputs:
    return {
        "pixel_values": torch.zeros(1, config.num_patches, patch_pixels(config)),
        "pixel_attention_mask": (torch.arange(config.num_patches) == 0).int()[None],
        "spatial_shapes": torch.tensor([[1, 1]]),
    }


def feature_lengths(config: PreTrainedConfig, lengths: Tensor) -> list[int]:
    """How many features an audio tower gives for sounds of so many frames (`mel`) or samples (`wave`)."""
    counted = _on_meta(config)._get_feat_extract_output_lengths(lengths.cpu())
    if isinstance(counted, tuple):  # behind the convolutions, and behind a pooling that may be another module's
        counted = counted[0] if _mel_length(_text(config)) == config.max_source_positions else counted[-1]
    return cast(list[int], counted.long().tolist())


@lru_cache(maxsize=16)
@torch.no_grad()
def _mel_length(text: str) -> int:
    """How many features a `mel` tower gives for all frames, read off what it gives on the meta device."""
    tower = _tower_on_meta(text)
    frames = torch.zeros(1, tower.config.num_mel_bins, 2 * tower.config.max_source_positions, device="meta")
    return int(tower(input_features=frames).last_hidden_state.shape[-2])


def _mel_shapes(config: PreTrainedConfig, inputs: Inputs) -> list[Shape]:
    return [(length,) for length in feature_lengths(config, inputs["frame_mask"].sum(-1))]


def _mel_features(tower: Any, inputs: Inputs) -> Tensor:
    features = tower(input_features=inputs["input_features"]).last_hidden_state  # [n, P, C], silence included
    return _valid(features, _mel_shapes(tower.config, inputs))


def _valid(features: Tensor, shapes: list[Shape]) -> Tensor:
    lengths = torch.tensor([shape[0] for shape in shapes], device=features.device)
    return features[torch.arange(features.shape[1], device=features.device) < lengths[:, None]]


def _mel_blank(config: PreTrainedConfig) -> Inputs:
    frames = 2 * config.max_source_positions
    return {
        "input_features": torch.zeros(1, config.num_mel_bins, frames),
        "frame_mask": torch.ones(1, frames, dtype=torch.long),
    }


def _wave_shapes(config: PreTrainedConfig, inputs: Inputs) -> list[Shape]:
    return [(length,) for length in feature_lengths(config, inputs["lengths"])]


def _wave_features(tower: Any, inputs: Inputs) -> Tensor:
    waves = inputs["input_values"].split(inputs["lengths"].tolist())
    # group norm takes the mean of a whole wave, so it has to know where that ends
    beyond = float("nan") if getattr(tower.config, "feat_extract_norm", None) == "group" else 0.0
    values = nn.utils.rnn.pad_sequence(waves, batch_first=True, padding_value=beyond)  # [n, longest]
    mask = torch.arange(values.shape[1], device=values.device) < inputs["lengths"].to(values.device)[:, None]
    features = tower(input_values=values, attention_mask=mask.long()).last_hidden_state
    return _valid(features, _wave_shapes(tower.config, inputs))


def _each_wave_alone(
    forward: Callable[..., Tensor], extractor: nn.Module, layers: list[tuple[int, int]], values: Tensor
) -> Tensor:
    """The convolutions (kernels and strides) of a tower with group norm for waves [n, N], NaN behind their end.

    Returns:
        [n, C, P], as long as for a wave of N samples.
    """
    length = values.shape[1]
    for kernel, stride in layers:
        length = (length - kernel) // stride + 1
    alone = [forward(extractor, wave[~wave.isnan()][None])[0] for wave in values]  # each [C, P]
    return torch.stack([F.pad(features, (0, length - features.shape[1])) for features in alone])


def _wave_blank(config: PreTrainedConfig) -> Inputs:
    samples = 2
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return {"input_values": torch.zeros(samples), "lengths": torch.tensor([samples])}


def _wave_channels(config: PreTrainedConfig) -> int:
    return int(config.output_hidden_size if getattr(config, "add_adapter", False) else config.hidden_size)


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "square",
            ("image", "video"),
            ("pixel_values",),
            _square_shapes,
            _square_features,
            lambda config: square_grid(config)[2],
            _square_blank,
        ),
        Kind(
            "patches",
            ("image", "video"),
            ("pixel_values", "grid_thw"),
            _patches_shapes,
            _patches_features,
            lambda config: int(config.out_hidden_size),
            _patches_blank,
        ),
        Kind(
            "sizes",
            ("image",),
            ("pixel_values", "grid_thw"),
            _sizes_shapes,
            _sizes_features,
            lambda config: int(config.hidden_size),
            _sizes_blank,
        ),
        Kind(
            "shapes",
            ("image",),
            ("pixel_values", "pixel_attention_mask", "spatial_shapes"),
            _shapes_shapes,
            _shapes_features,
            lambda config: int(config.hidden_size),
            _shapes_blank,
        ),
        Kind(
            "mel",
            ("audio",),
            ("input_features", "frame_mask"),
            _mel_shapes,
            _mel_features,
            lambda config: int(config.d_model if hasattr(config, "d_model") else config.hidden_size),
            _mel_blank,
        ),
        Kind(
            "wave",
            ("audio",),
            ("input_values", "lengths"),
            _wave_shapes,
            _wave_features,
            _wave_channels,
            _wave_blank,
        ),
    )
}


def register_encoder(name: str, model_class: type[PreTrainedModel]) -> None:
    """Make a tower of one's own known to transformers' Auto classes, and so to `model.encoders`.

    Args:
        name: its `model_type`, as YAML files say it; that of its config class.
        model_class: a `PreTrainedModel` with a `config_class`. Its forward takes what one of the kinds above takes, and
            gives `last_hidden_state`; that of pictures of one size is [n, P, C].

    Raises:
        ModelError: the name is not its config's, or another class's.
    """
    config_class = cast(Any, model_class.config_class)
    if config_class is None or config_class.model_type != name:
        raise ModelError(f"encoder {name!r}: {model_class.__name__}.config_class must have model_type = {name!r}")
    try:
        AutoConfig.register(name, config_class, exist_ok=True)
        known = MODEL_MAPPING.get(config_class, model_class)
        AutoModel.register(config_class, model_class, exist_ok=True)
    except ValueError as error:
        raise ModelError(f"encoder {name!r} cannot be registered: {error}") from error
    if known is not model_class:
        raise ModelError(f"encoder {name!r} is {known.__name__} already: register yours under another name")
