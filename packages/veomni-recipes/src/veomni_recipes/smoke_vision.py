"""`--smoke` for models of transformers that see and hear: a tiny random one of an architecture, with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veomni_recipes.multimodal_data import set_token_ids
from veomni_recipes.qwen_processors import qwen_processor

_VISION = {
    "patch_size": 16,
    "window_size": 64,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 16,
    "tokens_per_second": 2,
}
_AUDIO = {"n_window": 50, "n_window_infer": 200, "downsample_hidden_size": 4, "conv_chunksize": 3, "num_mel_bins": 16}
_PIXELS = 32 * 32, 64 * 64
"""The fewest and most of a picture: it becomes one to four tokens."""


def save_tiny_model(kind: str, tokenizer: Any, folder: Path) -> list[str]:
    """Write a model with random weights and its processor.

    Args:
        kind: a model type of transformers, of a Qwen model that sees, or of the thinker of one that hears too.
        tokenizer: see `qwen_processor`.
        folder: made if it is not there.

    Returns:
        What it reads beside text, as `write_media` calls it.
    """
    from transformers import CONFIG_MAPPING
    from veomni_models import build_foundation_model, tiny_config

    config = tiny_config(CONFIG_MAPPING[kind]())
    audio = getattr(config, "audio_config", None)
    for part, sizes in ((config.vision_config, _VISION), (audio, _AUDIO)):
        for key, value in sizes.items():
            if hasattr(part, key):
                setattr(part, key, value)
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.max_position_embeddings = 2048
    rope = config.text_config.rope_parameters
    config.text_config.rope_parameters = {**rope, "mrope_section": [2, 1, 1]}  # of a head's 4 frequencies
    processor = qwen_processor(config, tokenizer, pixels=_PIXELS)
    set_token_ids(config, processor)
    build_foundation_model(config, init_device="cpu").save_pretrained(folder)
    processor.save_pretrained(folder)
    return ["image", "video", *(["audio"] if audio is not None else [])]
