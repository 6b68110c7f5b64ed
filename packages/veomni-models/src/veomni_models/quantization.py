"""Frozen weights in 8 or 4 bits, under adapters that learn (QLoRA, arXiv 2305.14314), by torchao."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from veomni_models.errors import ModelError


def quantize_frozen(model: nn.Module, bits: Literal[8, 4] = 8, *, group_size: int = 128) -> list[str]:
    """Quantise the weights of all frozen linear layers in place; what they compute keeps its dtype.

    Call it when the model has its weights and the parts that learn are known, then add adapters. Layers that learn,
    the output head, embeddings, norms and experts stay as they are. 8 bits: one scale a row; 4 bits: one scale for each
    `group_size` inputs (fewer where a layer has fewer). Weights are then neither sharded nor trained: wrap such a model
    by ddp.

    Returns:
        The names of the layers.

    Raises:
        ModelError: torchao is not installed, other bits, weights on the meta device, or nothing is frozen.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    except ImportError as error:
        raise ModelError("quantised weights need torchao: pip install torchao") from error
    if bits not in (8, 4):
        raise ModelError(f"bits={bits} is neither 8 nor 4")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    chosen = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and not any(p.requires_grad for p in layer.parameters())
    }
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no frozen linear layer to quantise: freeze the model before")
    if on_meta := next((name for name, layer in chosen.items() if layer.weight.is_meta), None):
        raise ModelError(f"{on_meta} is on the meta device: load its weights before it is quantised")
    for size in sorted({group_size_for(layer, group_size) for layer in chosen.values()}):
        config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(size))
        own = {id(layer) for layer in chosen.values() if group_size_for(layer, group_size) == size}
        quantize_(model, config, filter_fn=lambda module, name, own=own: id(module) in own)
    for layer in chosen.values():
        layer.weight.requires_grad_(False)
    return list(chosen)


def group_size_for(layer: nn.Linear, wanted: int) -> int:
    """The largest size of at most `wanted` that divides the layer's inputs."""
    return next(size for size in range(min(wanted, layer.in_features), 0, -1) if layer.in_features % size == 0)
