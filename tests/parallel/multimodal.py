"""Tiny models with towers, and samples with pictures and sounds in them."""

from __future__ import annotations

import copy
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from tests.parallel.parity import TINY, VOCABULARY, Batch, Gradients

IMAGE, AUDIO, VIDEO, START = 1, 2, 3, 4
SAMPLES: list[tuple[int, list[tuple[int, int]], list[int], list[tuple[int, int]]]] = [
    # text tokens, pictures (height and width in merged patches), frames of sounds, videos (two frames of such patches)
    (7, [(2, 2), (1, 2)], [13], []),
    (9, [], [], []),
    (3, [(2, 1)], [], []),
    (5, [], [20, 9], []),
    (6, [(1, 1), (3, 2), (1, 2)], [], [(1, 2)]),
    (4, [], [], []),
]
"""58 tokens and more, which no number of ranks divides."""

TEXT = {
    **TINY,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
}
WINDOWED = {**VISION, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32, "tokens_per_second": 2}
DEEP = {**VISION, "deepstack_visual_indexes": [0, 1], "out_hidden_size": 32, "num_position_embeddings": 16}
SOUND = {
    "num_mel_bins": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "n_window": 4,
    "output_dim": 32,
    "max_source_positions": 64,
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": 5}
OMNI_TOKENS = {**TOKENS, "audio_token_id": AUDIO, "image_token_index": IMAGE, "audio_token_index": AUDIO}

MODELS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    # class of the config, class of the model, keys, what it takes
    "qwen2_vl": (
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": TEXT,
            "vision_config": {**VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            **TOKENS,
        },
        {"image"},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": TEXT, "vision_config": WINDOWED, **TOKENS},
        {"image"},
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {"text_config": TEXT, "vision_config": DEEP, **TOKENS},
        {"image"},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        {"text_config": {**TEXT, **MIXTURE}, "vision_config": DEEP, **TOKENS},
        {"image"},
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 6,
                "layer_types": ["linear_attention", "full_attention"],
            },
            "vision_config": {**DEEP, "deepstack_visual_indexes": []},
            **TOKENS,
        },
        {"image"},
    ),
    "qwen2_5_omni": (
        "Qwen2_5OmniThinkerConfig",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {"text_config": TEXT, "vision_config": WINDOWED, "audio_config": SOUND, **OMNI_TOKENS},
        {"image", "audio"},
    ),
    "qwen3_omni": (
        "Qwen3OmniMoeThinkerConfig",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": {**TEXT, **MIXTURE},
            "vision_config": DEEP,
            # 13 tokens for 100 frames are written into the modeling file
            "audio_config": {
                **SOUND,
                "n_window": 50,
                "n_window_infer": 200,
                "downsample_hidden_size": 4,
                "conv_chunksize": 3,
            },
            **OMNI_TOKENS,
        },
        {"image", "audio"},
    ),
    "gemma3": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **{key: value for key, value in TEXT.items() if key != "rope_parameters"},
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "image_token_id": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": 5,
        },
        {"square"},
    ),
}


def build_multimodal(name: str) -> nn.Module:
    """A tiny model in float32, the same on every process."""
    import transformers

    config_class, model_class, keys, _ = MODELS[name]
    config = getattr(transformers, config_class)(**copy.deepcopy(keys))
    torch.manual_seed(0)
    model = getattr(transformers, model_class)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
                if not parameter.any():  # a projector that begins at zero would hide its tower
                    parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _sound_tokens(name: str, frames: int) -> int:
    if name == "qwen2_5_omni":
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

    return int(_get_feat_extract_output_lengths(torch.tensor([frames]), 50)[0])


@cache
def multimodal_samples(name: str, skip: tuple[str, ...] = ()) -> list[Batch]:
    """Samples as a processor makes them, each a row [1, S]; without the modalities to skip, text stands instead."""
    generator = torch.Generator().manual_seed(7)
    takes, out = MODELS[name][3] - set(skip), []
    for text, pictures, sounds, videos in SAMPLES:
        ids = torch.randint(6, VOCABULARY, (text,), generator=generator).tolist()
        rows = [[position, position, position] for position in range(text)]
        sample: Batch = {}
        grids, patches, squares, frames, clips, clip_grids = [], [], [], [], [], []

        def put(token: int, number: int, width: int, ids: list[int] = ids, rows: list[list[int]] = rows) -> None:
            """Placeholders before the last token of the text, with positions of two dimensions."""
            at, last = len(ids) - 1, rows.pop()
            rows.extend([last[0], last[0] + index // width, last[0] + index % width] for index in range(number))
            rows.append([max(rows[-1]) + 1] * 3)
            ids[at:at] = [token] * number

        for height, width in pictures:
            size = 4 * height * width
            if "image" in takes:
                grids.append([1, 2 * height, 2 * width])
                patches.append(torch.randn(size, 2 * 3 * 16, generator=generator))
                put(IMAGE, height * width, width)
            if "square" in takes:
                squares.append(torch.randn(1, 3, 16, 16, generator=generator))
                put(IMAGE, 4, 2)
                ids.insert(-1, 6)  # two pictures side by side would be one block
                rows.append([rows[-1][0] + 1] * 3)
        for length in sounds:
            if "audio" in takes:
                if name == "qwen3_omni" and length > 13:
                    length += 100  # one sound shorter than a chunk beside longer ones
                frames.append(torch.randn(8, length, generator=generator))
                put(AUDIO, _sound_tokens(name, length), 1000)
        for height, width in videos:
            if "image" in takes:
                clip_grids.append([2, 2 * height, 2 * width])
                clips.append(torch.randn(8 * height * width, 2 * 3 * 16, generator=generator))
                put(VIDEO, 2 * height * width, width)
        if clips:
            sample |= {"video_grid_thw": torch.tensor(clip_grids), "pixel_values_videos": torch.cat(clips)}
        if grids:
            sample |= {"image_grid_thw": torch.tensor(grids), "pixel_values": torch.cat(patches)}
        if squares:
            sample["pixel_values"] = torch.cat(squares)
        if frames:
            sample["sounds"] = frames
        sample["input_ids"] = torch.tensor([ids])
        positions = torch.tensor(rows).T[:, None]  # [3, 1, S]
        sample["position_ids"] = positions[0] if "square" in takes else positions
        targets = torch.tensor([[*ids[1:], -100]])
        sample["shift_labels"] = targets.masked_fill((targets < 6) & (targets >= 0), -100)
        if "square" in MODELS[name][3]:
            sample["token_type_ids"] = (sample["input_ids"] == IMAGE).long()
            sample["position_ids"] = torch.arange(len(ids))[None]
        out.append(sample)
    return out


def pack_multimodal(samples: list[Batch]) -> Batch:
    """One row of several samples, as the collator makes it."""
    row: Batch = {}
    for key in ("input_ids", "position_ids", "shift_labels", "token_type_ids"):
        if key in samples[0]:
            row[key] = torch.cat([sample[key] for sample in samples], dim=-1)
    for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        if values := [sample[key] for sample in samples if key in sample]:
            row[key] = torch.cat(values)
    sounds = [sound for sample in samples for sound in sample.get("sounds", ())]
    if sounds:
        longest = max(sound.shape[1] for sound in sounds)
        row["input_features"] = torch.stack([nn.functional.pad(s, (0, longest - s.shape[1])) for s in sounds])
        lengths = torch.tensor([sound.shape[1] for sound in sounds])
        row["feature_attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return row | dict(
        zip(
            ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
            (ends, ends.clone(), max(lengths), max(lengths)),
            strict=True,
        )
    )


def multimodal_loss(model: nn.Module, batch: Batch, targets: torch.Tensor, total: int) -> torch.Tensor:
    """Sum over this rank's targets [1, S], divided by all targets of the step."""
    logits = model(**{key: value for key, value in batch.items() if key != "shift_labels"}).logits
    return nn.functional.cross_entropy(logits[0], targets[0], reduction="sum") / total


def count(samples: list[Batch]) -> int:
    return sum(int((sample["shift_labels"] != -100).sum()) for sample in samples)


@cache
def multimodal_truth(name: str, skip: tuple[str, ...] = ()) -> tuple[float, Gradients]:
    """Loss and gradients of the samples, each alone through the untouched model."""
    model, data, loss = build_multimodal(name), multimodal_samples(name, skip), 0.0
    for sample in data:
        alone = pack_multimodal([sample])
        for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            del alone[key]
        one = multimodal_loss(model, alone, sample["shift_labels"], count(data))
        one.backward()
        loss += one.item()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
