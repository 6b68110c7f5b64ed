"""Tiny transformers of diffusers of each family, with samples that were encoded in advance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WORDS = 6
SMALL = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "flux": {
        "_class_name": "FluxTransformer2DModel",
        **SMALL,
        "in_channels": 8,
        "num_single_layers": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 4),
        "guidance_embeds": True,
    },
    "wan": {
        "_class_name": "WanTransformer3DModel",
        **SMALL,
        "in_channels": 2,
        "out_channels": 2,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 48,
    },
    "sd3": {
        "_class_name": "SD3Transformer2DModel",
        **SMALL,
        "in_channels": 2,
        "out_channels": 2,
        "sample_size": 16,
        "pos_embed_max_size": 16,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "caption_projection_dim": 48,
    },
    "dit": {
        "_class_name": "DiTTransformer2DModel",
        **SMALL,
        "in_channels": 2,
        "out_channels": 4,
        "sample_size": 8,
        "num_embeds_ada_norm": 5,
        "norm_num_groups": 1,
    },
}


def fill(model: nn.Module) -> nn.Module:
    """The model with weights that are the same on every process, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def conditions(name: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What a sample's transformer is told beside latents and time."""
    if name == "dit":
        return {"class_labels": torch.randint(5, (), generator=generator)}
    told = {"encoder_hidden_states": torch.randn(WORDS, 16, generator=generator)}
    return told if name == "wan" else told | {"pooled_projections": torch.randn(16, generator=generator)}


def samples(name: str) -> list[dict[str, Any]]:
    """Eight samples, of two sizes where the family knows several."""
    generator = torch.Generator().manual_seed(3)
    out = []
    for index in range(8):
        size = (8, 8) if index < 4 or name == "dit" else (4, 8)
        shape = (2, 2, *size) if name == "wan" else (2, *size)
        latents = torch.randn(shape, generator=generator)
        out.append({"id": 100 + index, "latents": latents, **conditions(name, generator)})
    return out
