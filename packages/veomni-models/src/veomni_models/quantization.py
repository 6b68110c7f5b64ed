"""Frozen weights in 8 or 4 bits, under adapters that learn (QLoRA, arXiv 2305.14314), by torchao."""

from __future__ import annotations

from typing import Literal

from torch import nn

from veomni_models.errors import ModelError

_SCALES = 256
"""Scales of groups that have one scale in common; as in the paper."""


def quantize_frozen(model: nn.Module, bits: Literal[8, 4] = 8, *, group_size: int = 64) -> list[str]:
    """Quantise the weights of all frozen linear layers in place; what they compute keeps its dtype.

    Call it when the model has its weights and the parts that learn are known, then add adapters. Layers that learn,
    the output head, embeddings, norms and experts stay as they are. 8 bits: integers with one scale a row; 4 bits: NF4,
    two weights a byte, with one scale for each `group_size` weights (fewer where that does not divide them), which is
    kept in 8 bits itself. Weights are then neither sharded nor trained: wrap such a model by ddp.

    Returns:
        The names of the layers.

    Raises:
        ModelError: torchao is not installed, other bits, weights on the meta device, or nothing is frozen.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4
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
    if bits == 8:
        own = {id(layer) for layer in chosen.values()}
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: id(module) in own)
        for layer in chosen.values():
            layer.weight.requires_grad_(False)
    else:
        chosen = {name: layer for name, layer in chosen.items() if layer.weight.numel() % 2 == 0}  # two share a byte
        for layer in chosen.values():
            size = _largest_divisor(layer.weight.numel(), group_size)
            scales = _largest_divisor(layer.weight.numel() // size, _SCALES)
            layer.weight = nn.Parameter(to_nf4(layer.weight.detach(), size, scales), requires_grad=False)
    return list(chosen)


def _largest_divisor(number: int, most: int) -> int:
    return next(size for size in range(min(most, number), 0, -1) if number % size == 0)
