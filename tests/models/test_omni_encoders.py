"""Towers of every kind in an omni model: a packed row is each input alone through the untouched transformers parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from veomni_data import PackingCollator
from veomni_models import OmniModel, OmniProcessor
from veomni_models.towers import tower_class

from .omni_parts import PICTURES, SOUNDS, assemble, encoders_of, picture, sample, sound

Truth = Callable[[OmniModel, OmniProcessor, Any, Any], torch.Tensor]


def samples_of(processor: OmniProcessor) -> list[tuple[dict[str, torch.Tensor], list[Any]]]:
    """Samples with the inputs of each: two with several of them, one without any."""
    if processor.image_token:
        sizes = [(16, 24), (30, 12), (8, 8)]
        first, *rest = (picture(h, w, i) for i, (h, w) in enumerate(sizes))
        return [
            (sample(processor, "what is <image> this one", images=[first]), [first]),
            (sample(processor, "<image> two <image> three picture", images=rest), rest),
            (sample(processor, "one two three"), []),
        ]
    first, *rest = (sound(samples, i) for i, samples in enumerate((9_000, 15_000, 5_600)))
    return [
        (sample(processor, "what is <audio> this one", audio=[first]), [first]),
        (sample(processor, "<audio> two <audio> three sound", audio=rest), rest),
        (sample(processor, "one two three"), []),
    ]


def features_of_one(tower: Any, processor: OmniProcessor, item: Any) -> torch.Tensor:
    """[..., C]: what a plain tower of transformers gives for one input that its own processor made."""
    if processor.audio_token:
        extractor = processor.feature_extractor
        made = extractor(item, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
        if "input_values" in made:
            return tower(made["input_values"]).last_hidden_state[0]
        out = tower(made["input_features"]).last_hidden_state.reshape(-1, tower.config.hidden_size)
        frames = made["attention_mask"].sum() + 1
        return out[: frames // 2 if len(out) == 50 else ((frames // 2) - 2) // 2 + 1]
    made = processor.image_processor([item], return_tensors="pt")
    kind = tower.config.model_type
    if kind.startswith("qwen"):
        return tower(made["pixel_values"], grid_thw=made["image_grid_thw"]).pooler_output
    if kind == "pixtral":
        height, width = (int(side) // tower.config.patch_size for side in made["image_sizes"][0])
        return tower(**made).last_hidden_state[0].view(height, width, -1)
    if kind.startswith("siglip2"):
        return tower(**made).last_hidden_state[0][made["pixel_attention_mask"][0].bool()]
    out = tower(**made).last_hidden_state[0]
    if out.ndim == 3:
        return out.permute(1, 2, 0)
    grid = 4
    return out[-grid * grid :].view(grid, grid, -1)


def merged(features: torch.Tensor, size: int) -> torch.Tensor:
    """Plain loops over neighbourhoods; what is missing at an edge is zero."""
    if features.ndim == 2:
        rows = list(features) + [torch.zeros_like(features[0])] * (-len(features) % size)
        return torch.stack([torch.cat(rows[i : i + size]) for i in range(0, len(rows), size)])
    height, width, channels = features.shape
    full = torch.zeros(height + -height % size, width + -width % size, channels)
    full[:height, :width] = features
    return torch.stack(
        [
            torch.cat([full[y + i, x + j] for i in range(size) for j in range(size)])
            for y in range(0, len(full), size)
            for x in range(0, full.shape[1], size)
        ]
    )


def loss_and_gradients(model: torch.nn.Module, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("name", [*PICTURES, *SOUNDS])
def test_a_packed_row_is_each_input_alone_through_the_plain_parts(name: str, tmp_path: Path) -> None:
    omni, processor = assemble(encoders_of(name), tmp_path)
    (modality,) = omni.config.encoders
    data = samples_of(processor)
    row = PackingCollator()([one for one, _ in data])
    total = int((row["shift_labels"] != -100).sum())
    got, got_gradients = loss_and_gradients(omni, omni(**row, num_items_in_batch=total, use_cache=False).loss)

    encoder, token = omni.config.encoders[modality], omni.config.__dict__[f"{modality}_token_id"]
    plain = copy.deepcopy(omni)
    plain.foundation = AutoModelForCausalLM.from_config(
        copy.deepcopy(omni.config.text_config), attn_implementation="eager"
    )
    plain.foundation.load_state_dict(omni.foundation.state_dict())
    cls = tower_class(encoder["config"])
    plain.encoders[modality] = cls._from_config(copy.deepcopy(encoder["config"]))
    plain.encoders[modality].load_state_dict(omni.encoders[modality].state_dict(), strict=False)
    plain.train()
    loss: Any = 0.0
    for one, items in data:
        embeds = plain.foundation.get_input_embeddings()(one["input_ids"]).clone()
        parts = [features_of_one(plain.encoders[modality], processor, item) for item in items]
        merge = encoder["merge_size"]
        parts = [merged(p, merge) if merge > 1 else p.reshape(-1, p.shape[-1]) for p in parts]
        if parts:
            embeds[one["input_ids"] == token] = torch.cat([plain.projectors[modality](p, [len(p)]) for p in parts])
        loss = (
            loss
            + plain.foundation(
                inputs_embeds=embeds[None], labels=one["labels"][None], num_items_in_batch=total, use_cache=False
            ).loss
        )
    want, want_gradients = loss_and_gradients(plain, loss)
    assert got == pytest.approx(want, rel=1e-5)
    largest = max(g.abs().max() for g in want_gradients.values())
    assert any(n.startswith("encoders") and g.abs().max() > 1e-4 * largest for n, g in want_gradients.items())
    for name, gradient in want_gradients.items():
        difference = (got_gradients[name] - gradient).abs().max()
        assert difference <= 2e-5 * largest, f"{name} is off by {difference:.1e}"
