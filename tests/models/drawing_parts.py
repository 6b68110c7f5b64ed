"""Tiny omni models that draw, in both ways, and rows with pictures to read and to draw for them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from veomni_models import OmniModel, build_omni_model

from .test_initialization import PARTS

IMAGE, DRAWN, START, END = PARTS["image_token_id"], 1, 2, 3
SIDE, TOKENS = 8, 4
DECODERS: dict[str, dict[str, Any]] = {
    "flow": {
        "model_type": "flow_decoder",
        "image_size": SIDE,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_tokens": TOKENS,
        "noise_samples": 2,
    },
    "codes": {
        "model_type": "janus_vqgan",
        "num_embeddings": 8,
        "embed_dim": 4,
        "num_patches": 2,
        "channel_multiplier": [1, 1, 1],
        "base_channels": 32,
        "latent_channels": 8,
        "num_res_blocks": 1,
    },
}
SAMPLES = [(12, 1, 0), (17, 1, 1), (9, 0, 0), (13, 0, 1), (20, 1, 2), (15, 0, 0)]
"""Tokens, pictures that are read, and pictures that are drawn."""
SEED = 5


def build(way: str) -> OmniModel:
    """The same weights whenever it is called."""
    model = build_omni_model(
        **PARTS,
        decoders={"image": DECODERS[way]},
        image_gen_token_id=DRAWN,
        image_gen_start_token_id=START,
        image_gen_end_token_id=END,
        init_device="cpu",
        seed=0,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "decoders.image.picture" in name:  # which begin with zeros
                parameter.normal_(std=0.3, generator=generator)
    return model


def samples(drawing: bool = True) -> list[dict[str, torch.Tensor]]:
    """Tensors of each sample: input_ids, labels [T]; pixel_values and target_pixel_values [n, 3, 8, 8] if there are."""
    generator, out = torch.Generator().manual_seed(1), []
    for length, read, drawn in SAMPLES:
        ids = torch.randint(6, 41, (length,), generator=generator)
        pixels = torch.randn(read, 3, SIDE, SIDE, generator=generator)
        targets = torch.rand(drawn, 3, SIDE, SIDE, generator=generator) * 2 - 1
        if read:
            ids[1:5] = IMAGE
        for i in range(drawn if drawing else 0):
            ids[6 + 6 * i : 12 + 6 * i] = torch.tensor([START, *[DRAWN] * TOKENS, END])
        labels = ids.masked_fill(ids == IMAGE, -100)
        labels[:3] = -100
        sample = {"input_ids": ids, "labels": labels}
        sample |= {"pixel_values": pixels} if read else {}
        out.append(sample | ({"target_pixel_values": targets} if drawn and drawing else {}))
    return out


def pack(row: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """One packed row, as a collator makes it."""
    lengths = [len(sample["input_ids"]) for sample in row]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    shifted = [torch.cat([sample["labels"][1:], torch.tensor([-100])]) for sample in row]
    batch: dict[str, Any] = {
        "input_ids": torch.cat([sample["input_ids"] for sample in row])[None],
        "labels": torch.cat([sample["labels"] for sample in row])[None],
        "shift_labels": torch.cat(shifted)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    for key in ("pixel_values", "target_pixel_values"):
        if parts := [sample[key] for sample in row if key in sample]:
            batch[key] = torch.cat(parts)
    return batch


def alone(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A sample as a batch of one row that is not packed."""
    return {key: value[None] if key in ("input_ids", "labels") else value for key, value in sample.items()}


def count(row: list[dict[str, torch.Tensor]]) -> int:
    """Target tokens."""
    return sum(int((sample["labels"][1:] != -100).sum()) for sample in row)


def reference(way: str, row: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process that runs each sample alone."""
    model, total = build(way), count(row)
    losses = [model(**alone(sample), num_items_in_batch=total, noise_seed=SEED).loss for sample in row]
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
