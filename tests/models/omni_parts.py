"""Tiny omni models with towers of every kind, and pictures, videos and sounds for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from veomni_models import OmniModel, OmniProcessor, build_omni_model, build_omni_processor

from .test_initialization import PARTS

_VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SQUARE = {**_VIT, "image_size": 8, "patch_size": 2}
_QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 24}
_MEL = {"num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "d_model": 16}
_WAVE = {
    **_VIT,
    "conv_dim": [16, 16],
    "conv_kernel": [40, 8],
    "conv_stride": [20, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "activation_dropout": 0.0,
    "mask_time_prob": 0.0,
}
PICTURES: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {**_SQUARE, "merge_size": 2},
    "clip_vision_model": {**_SQUARE, "projector": "pixel_shuffle"},
    "dinov2": {**{k: v for k, v in _SQUARE.items() if k != "intermediate_size"}, "merge_size": 2},
    "dinov3_vit": {**_SQUARE, "num_register_tokens": 4, "projector": "linear"},
    "vit": {**_SQUARE, "projector": {"type": "perceiver", "num_tokens": 3, "num_heads": 4}},
    "swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 2,
        "drop_path_rate": 0.0,
    },
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "image_size": 16},
    "qwen2_5_vl_vision": {**_QWEN, "window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl_vision": {**_QWEN, "deepstack_visual_indexes": [], "num_position_embeddings": 16},
    "pixtral": {**_VIT, "image_size": 24, "patch_size": 4, "head_dim": 8, "merge_size": 2},
    "siglip2_vision_model": {
        **_VIT,
        "num_patches": 16,
        "patch_size": 4,
        "projector": {"type": "perceiver", "num_tokens": 2, "num_heads": 4},
    },
}
SOUNDS: dict[str, dict[str, Any]] = {
    "whisper": {**_MEL, "max_source_positions": 50, "merge_size": 4},
    "qwen2_audio_encoder": {**_MEL, "max_source_positions": 50, "projector": "linear"},
    "voxtral_encoder": {
        **_VIT,
        "num_mel_bins": 8,
        "max_source_positions": 50,
        "projector": {"type": "perceiver", "num_tokens": 4, "num_heads": 4, "num_layers": 1},
    },
    "wav2vec2": {**_WAVE, "merge_size": 3},
    "hubert": {**_WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
    "wavlm": {**_WAVE, "num_buckets": 8, "max_bucket_distance": 16},
}
WORDS = ["[UNK]", "<end>", "what", "is", "this", "one", "two", "three", "sound", "picture"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p.type }}>{% endif %}{% endfor %}{% endif %} <end> {% endfor %}"
)


def encoders_of(name: str) -> dict[str, dict[str, Any]]:
    """One encoder by its model type."""
    modality = "image" if name in PICTURES else "audio"
    return {modality: {"model_type": name, **(PICTURES | SOUNDS)[name]}}


def save_tokenizer(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<end>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    return folder


def assemble(encoders: dict[str, Any], folder: Path, **options: Any) -> tuple[OmniModel, OmniProcessor]:
    """The model, from random weights that are large enough to matter, and its processor."""
    processor = build_omni_processor(save_tokenizer(folder), encoders=encoders)
    model = build_omni_model(
        foundation=PARTS["foundation"],
        encoders=encoders,
        vocab_size=len(processor.tokenizer),
        **processor.placeholder_ids,
        init_device="cpu",
        **options,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model, processor


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def clip(frames: int, height: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)


def sound(samples: int, seed: int = 0) -> Any:
    noise = np.random.default_rng(seed).normal(size=samples)
    return (np.sin(np.arange(samples) / (8 + 3 * seed)) + 0.3 * noise).astype(np.float32)


def sample(processor: OmniProcessor, text: str, **media: Any) -> dict[str, torch.Tensor]:
    """What a dataset would give: tensors of one sample; all but placeholders are learnt."""
    made = dict(processor(text=[text], return_tensors="pt", return_token_type_ids=False, **media))
    ids = made.pop("input_ids")[0]
    made.pop("attention_mask")
    labels = ids.clone()
    for token in processor.placeholder_ids.values():
        labels[ids == token] = -100
    return {"input_ids": ids, "labels": labels, **made}
