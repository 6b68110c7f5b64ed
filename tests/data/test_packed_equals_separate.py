"""A packed row is worth what its samples are worth one by one: the loss and every gradient, to float32 rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from veomni_data import PackingCollator

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PICTURE, VIDEO, START, END = 60, 61, 62, 63
TOKENS = {
    "image_token_id": PICTURE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 10_000.0}
PATCH = 3 * 2 * 4 * 4  # channels, frames of a patch, its height and width


def qwen2_5_vl() -> PreTrainedModel:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> PreTrainedModel:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS))


TEXT_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=8)),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**TEXT, sliding_window=4)),
}
PICTURE_MODELS = {"qwen2.5-vl": qwen2_5_vl, "qwen3-vl": qwen3_vl}


def built(make: Callable[[], PreTrainedModel], attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make()
    model.set_attn_implementation(attention)
    return model.train()


def text_sample(length: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (length,), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[: length // 3] = -100
    return {"input_ids": ids, "labels": labels}


def picture_sample(model: Any, grids: list[tuple[int, int]], words: int, seed: int) -> dict[str, Tensor]:
    """Words, pictures of grids of patches, words; with the positions of the model's own function."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randint(1, 60, (words,), generator=generator)]
    for height, width in grids:
        pieces += [torch.tensor([START]), torch.full((height * width // 4,), PICTURE), torch.tensor([END])]
    pieces.append(torch.randint(1, 60, (words + 3,), generator=generator))
    ids = torch.cat(pieces)
    labels = ids.clone()
    labels[: -(words + 3)] = -100
    sample = {"input_ids": ids, "labels": labels, "mm_token_type_ids": (ids == PICTURE).long()}
    if grids:
        sample["image_grid_thw"] = torch.tensor([[1, height, width] for height, width in grids])
        sample["pixel_values"] = torch.randn(sum(h * w for h, w in grids), PATCH, generator=generator)
    positions, _ = model.model.get_rope_index(
        ids[None], mm_token_type_ids=sample["mm_token_type_ids"][None], image_grid_thw=sample.get("image_grid_thw")
    )
    return sample | {"position_ids": positions[:, 0]}


def loss_and_gradients(model: PreTrainedModel, batches: list[dict[str, Any]], targets: int) -> tuple[float, Tensor]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=targets, use_cache=False).loss
        loss.backward()
        total += float(loss.detach())
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 20
    return total, torch.cat(gradients)


def separate(samples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Each sample as anyone would hand it to the model: without a word about positions or packing."""
    own = ("pixel_values", "image_grid_thw")
    return [{k: v if k in own else v[None] for k, v in s.items() if k != "position_ids"} for s in samples]


def assert_equal(model: PreTrainedModel, samples: list[dict[str, Tensor]], rows: list[dict[str, Any]]) -> None:
    targets = sum(int((s["labels"][1:] != -100).sum()) for s in samples)
    loss, gradients = loss_and_gradients(model, rows, targets)
    truth, true_gradients = loss_and_gradients(model, separate(samples), targets)
    assert abs(loss - truth) <= 1e-6 * truth
    assert float((gradients - true_gradients).norm() / true_gradients.norm()) <= 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TEXT_MODELS)
def test_text_in_a_packed_row_has_the_loss_and_gradients_of_separate_samples(family: str, attention: str) -> None:
    model = built(TEXT_MODELS[family], attention)
    samples = [text_sample(length, seed) for seed, length in enumerate((9, 17, 2, 6, 23))]
    assert_equal(model, samples, [PackingCollator()(samples)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PICTURE_MODELS)
def test_pictures_in_a_packed_row_have_the_loss_and_gradients_of_separate_samples(family: str, attention: str) -> None:
    model = built(PICTURE_MODELS[family], attention)
    samples = [
        picture_sample(model, [(4, 6)], 3, 0),
        picture_sample(model, [(2, 2), (6, 4)], 2, 1),
        picture_sample(model, [], 5, 2),
        picture_sample(model, [(4, 4)], 4, 3),
    ]
    del samples[2]["position_ids"]  # text alone needs none
    row = PackingCollator()(samples)
    assert row["position_ids"].shape == (4, 1, row["input_ids"].shape[1])
    assert_equal(model, samples, [row])


@pytest.mark.parametrize("family", [*TEXT_MODELS, *PICTURE_MODELS])
def test_samples_that_are_not_told_apart_do_not_have_it(family: str) -> None:
    if family in TEXT_MODELS:
        model = built(TEXT_MODELS[family], "sdpa")
        samples = [text_sample(length, seed) for seed, length in enumerate((9, 17))]
        row = PackingCollator(cu_seq_lens=False)(samples)
        row["position_ids"] = torch.arange(26)[None]
    else:
        model = built(PICTURE_MODELS[family], "sdpa")
        samples = [picture_sample(model, [(4, 6)], 3, 0), picture_sample(model, [(4, 4)], 4, 1)]
        row = PackingCollator(text_positions=False)(samples)
        assert row["position_ids"].shape == (3, 1, row["input_ids"].shape[1])
    with pytest.raises(AssertionError):
        assert_equal(model, samples, [row])


def test_a_row_of_rows_that_were_packed_before_has_the_loss_and_gradients_of_separate_samples() -> None:
    model = built(TEXT_MODELS["qwen3"], "sdpa")
    samples = [text_sample(length, seed) for seed, length in enumerate((9, 17, 2, 6))]
    prepared = [
        {
            "input_ids": torch.cat([s["input_ids"] for s in pair]),
            "labels": torch.cat([s["labels"] for s in pair]),
            "seq_lens": [len(s["input_ids"]) for s in pair],
        }
        for pair in (samples[:2], samples[2:])
    ]
    assert_equal(model, samples, [PackingCollator()(prepared)])


def test_sounds_of_different_lengths_joined_have_the_features_of_each_alone() -> None:
    audio = {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 8,
        "output_dim": 32,
        "n_window": 10,
        "max_source_positions": 200,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    config = Qwen2_5OmniThinkerConfig(
        audio_config=audio, vision_config=vision, text_config={**TEXT, "rope_parameters": ROPE}
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    sounds = [
        text_sample(3, frames)
        | {"input_features": torch.randn(1, 8, frames), "feature_attention_mask": torch.ones(1, frames).long()}
        for frames in (60, 44)
    ]

    def features(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return model.get_audio_features(batch["input_features"], batch["feature_attention_mask"]).last_hidden_state

    joined = features(PackingCollator()(sounds))
    assert len(joined) == 26
    assert joined.equal(torch.cat([features(sound) for sound in sounds]))
