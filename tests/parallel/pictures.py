"""Tiny diffusion transformers of diffusers, and noised pictures with what they are to predict."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.parallel.parity import Batch

HEIGHT, WIDTH, WORDS = 4, 2, 8
SMALL = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": (
        "FluxTransformer2DModel",
        {
            **SMALL,
            "in_channels": 8,
            "num_single_layers": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 4),
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {**SMALL, "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48},
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {
            **SMALL,
            "in_channels": 8,
            "out_channels": 8,
            "patch_size": 1,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 4, 4),
        },
    ),
}


def build(name: str, attn_implementation: str | None = None, **changes: Any) -> nn.Module:
    """A tiny model in float32, the same on every process, without a layer that begins at zero."""
    import diffusers

    class_name, keys = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, class_name)(**keys | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def samples(name: str) -> list[Batch]:
    """Nine pictures (Wan: videos), which neither two nor four ranks share evenly."""
    generator = torch.Generator().manual_seed(3)
    shape = (4, 2, 2 * HEIGHT, 2 * WIDTH) if name == "wan" else (HEIGHT * WIDTH, 8)
    out = []
    for index in range(9):
        noised, target, words, pooled = (
            torch.randn(size, generator=generator) for size in (shape, shape, (WORDS, 16), (16,))
        )
        sample = {"hidden_states": noised, "target": target, "encoder_hidden_states": words}
        out.append(sample | {"pooled_projections": pooled, "timestep": torch.tensor(0.1 * index)})
    return out


def stack(row: list[Batch]) -> Batch:
    """Pictures of one size as a batch."""
    return {key: torch.stack([sample[key] for sample in row]) for key in row[0]}


def whole(batch: Batch, rank: int, ranks: int) -> Batch:
    """Every rank of a row is handed all of it."""
    return batch


def loss(model: nn.Module, batch: Batch, total: int) -> torch.Tensor:
    """Squared errors of this batch, divided by all values of the step."""
    inputs = {key: value for key, value in batch.items() if key != "target"}
    kind = type(model).__name__ + type(getattr(model, "module", model)).__name__
    if "Flux" in kind:
        grid = torch.cartesian_prod(torch.zeros(1), torch.arange(HEIGHT).float(), torch.arange(WIDTH).float())
        inputs |= {"img_ids": grid, "txt_ids": torch.zeros(WORDS, 3)}
    else:
        del inputs["pooled_projections"]
    if "QwenImage" in kind:
        inputs["img_shapes"] = [[(1, HEIGHT, WIDTH)]] * len(batch["target"])
    if "Wan" in kind:
        inputs["timestep"] = inputs["timestep"] * 1000
    predicted = model(**inputs, return_dict=False)[0]
    return F.mse_loss(predicted, batch["target"], reduction="sum") / total
