"""Floating-point operations of a training step, from the model's structure and the batch; and of what devices can do.

A matrix product of [m, k] with [k, n] is 2 m k n operations. Counted are products: projections, experts (those that are
chosen), attention scores and values, convolutions, and the head; everything else is smaller by the width of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veomni_models.errors import ModelError
from veomni_models.foundation import build_foundation_model

if TYPE_CHECKING:
    pass

PEAK_TFLOPS: dict[str, float] = {
    # dense bfloat16 with float32 accumulation, without sparsity; data sheets of the makers
    "A100": 312.0,  # NVIDIA A100 80GB data sheet, 2021
    "A800": 312.0,
    "H100 PCIe": 756.0,  # NVIDIA H100 data sheet, 2023 (half of the figures with sparsity)
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "H200": 989.0,  # NVIDIA H200 data sheet, 2023
    "B200": 2250.0,  # NVIDIA DGX B200 data sheet, 2024, per GPU
    "GB200": 2500.0,
    "L40S": 362.0,  # NVIDIA L40S data sheet, 2023
    "L4": 121.0,
    "A10": 125.0,
    "4090": 165.2,  # NVIDIA Ada GPU architecture paper, float32 accumulation
    "MI250X": 383.0,  # AMD Instinct MI250X data sheet
    "MI300X": 1307.4,  # AMD Instinct MI300X data sheet, 2023
    "MI325X": 1307.4,
    "Ascend910B": 320.0,  # float16
    "v5p": 459.0,  # Google Cloud TPU documentation, per chip
    "v6e": 918.0,
}
"""Peak of one device in 10^12 operations a second, by a part of its name (the longest that fits)."""


def flops_per_step(model: nn.Module, batch: Mapping[str, Any], *, recompute: bool = False, causal: bool = True) -> int:
    """Floating-point operations of one forward and backward of `model` over `batch`.

    Backward costs twice the forward: gradients of inputs and of weights. A part that is frozen has no gradients of
    weights, and none of inputs if nothing before it learns. What the decoders of an omni model do, is left out.

    Args:
        model: a transformers model, on any device; or a config, all of whose parts then learn.
        batch: `input_ids` [B, T] and where its samples lie: `cu_seq_lens_q`, `position_ids` [1, T] that restart, or
            `attention_mask`; without them each row is one sample. Pictures and sounds: `pixel_values`,
            `image_grid_thw`, `pixel_values_videos`, `video_grid_thw`, `input_features`.
        recompute: the decoder's layers and the towers' run forward once more in backward.
        causal: count what a causal kernel needs, T (T + 1) / 2 pairs of tokens in a sample of T; False counts T^2, as
            kernels without skipping compute, and as torch's flop counter does.

    Raises:
        ModelError: the batch has no `input_ids`.
    """
    if "input_ids" not in batch:
        raise ModelError(f"flops_per_step needs input_ids [B, T]; the batch has {sorted(batch)}")
    lengths, tokens = sample_lengths(batch), batch["input_ids"].numel()
    if not isinstance(model, nn.Module):
        kind: Any = type(model)
        model = _structure_of(kind, model.to_json_string(use_diff=False))
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder = decoder if hasattr(decoder, "config") else model.base_model
    drawing = getattr(model, "decoders", None)  # of pictures
    not_counted = {id(module) for module in drawing.modules()} if isinstance(drawing, nn.ModuleDict) else set()
    towers = {name: tower for name, tower in _towers(model, decoder) if id(tower) not in not_counted}
    inside_towers = not_counted | {id(module) for tower in towers.values() for module in tower.modules()}
    total, learns = 0.0, False
    for tower in towers.values():
        (forward, first), own = _tower_forward(tower, batch), _learns(tower)
        total += forward * (1 + (2 + recompute) * own) - first * own  # pictures have no gradient
        learns |= own

    head = _head(model)
    text = [m for m in model.modules() if id(m) not in inside_towers and m is not head]
    forward = sum(_products(module, tokens, decoder.config) for module in text)
    forward += _attention(decoder, lengths, causal)
    own = _learns(decoder)
    through = learns or own
    total += forward * (1 + through * (1 + recompute) + own)
    if head is not None:
        total += 2 * tokens * head.weight.numel() * (1 + through + _learns(head))
    return int(total)


@lru_cache(maxsize=4)
def _structure_of(kind: Any, keys: str) -> nn.Module:
    """The model of a config, on the meta device."""
    return build_foundation_model(kind.from_dict(json.loads(keys)), attn_implementation=None, init_device="meta")


def mfu(flops: float, seconds: float, devices: int, device_name: str) -> float | None:
    """The share of the devices' peak that `flops` in `seconds` are; None for a device without a known peak.

    Args:
        flops: of the step, over all devices.
        seconds: that the step took.
        devices: number of them.
        device_name: as `torch.cuda.get_device_name()` gives it.
    """
    known = [name for name in PEAK_TFLOPS if name.lower() in device_name.lower()]
    return flops / seconds / devices / (PEAK_TFLOPS[max(known, key=len)] * 1e12) if known else None


def sample_lengths(batch: Mapping[str, Any]) -> list[int]:
    """Tokens of each sample of a batch."""
    ids, ends = batch["input_ids"], batch.get("cu_seq_lens_q")
    if ends is not None:
        return [b - a for a, b in pairwise(ends.tolist()) if b > a]
    if (mask := batch.get("attention_mask")) is not None and mask.ndim == 2:
        return [int(length) for length in mask.sum(1)]
    positions = batch.get("position_ids")
    if positions is not None and positions.ndim == 2 and positions.shape[0] == 1:
        starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        return [b - a for a, b in pairwise(sorted({0, *starts}))]
    return [ids.shape[1]] * ids.shape[0]


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _head(model: nn.Module) -> Any:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Linear) else None


def _towers(model: nn.Module, decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost models beside the decoder that take pictures, videos or sounds."""
    inside = {id(module) for module in decoder.modules()}
    found: list[str] = []
    for name, module in model.named_modules():
        if (
            not name
            or id(module) in inside
            or decoder in module.modules()
            or name.startswith(tuple(f"{f}." for f in found))
        ):
            continue
        if getattr(module, "main_input_name", None) and hasattr(module, "config"):
            found.append(name)
            yield name, module


def _products(module: nn.Module, rows: float, config: Any) -> float:
    """Operations of a module's own weights for so many rows of input, forward."""
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.Embedding | nn.modules.batchnorm._BatchNorm):
        return 0
    experts = [p for p in own.values() if p.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd)]
    if experts:  # [E, ., .] each
        return sum(2 * rows * _chosen(config) * p.numel() / p.shape[0] for p in experts)
    weight = own.get("weight")
    if weight is None or weight.ndim < 2:
        return 0
    return 2 * rows * weight.numel()


def _chosen(config: Any) -> int:
    """How many experts compute each token."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    return next((int(k) for name in names if (k := getattr(config, name, None))), 1)


def _attention(decoder: Any, lengths: list[int], causal: bool) -> float:
    """Operations of scores and values in all layers, forward, and of the states of linear attention."""
    config, total = decoder.config, 0.0
    for module in decoder.modules():
        kind = type(module).__name__
        if "Attention" in kind and not any(
            "Attention" in type(m).__name__ for m in module.modules() if m is not module
        ):
            heads = config.num_attention_heads
            head = getattr(module, "head_dim", None) or config.hidden_size // heads
            qk = getattr(module, "qk_head_dim", None) or head
            v = getattr(module, "v_head_dim", None) or head
            total += 2 * heads * (qk + v) * sum(_pairs(n, _window(module, config), causal) for n in lengths)
        elif hasattr(module, "head_k_dim") and hasattr(module, "num_v_heads"):
            # a state [Dk, Dv] a head is read, corrected and read again (gated delta rule)
            total += 6 * sum(lengths) * module.num_v_heads * module.head_k_dim * module.head_v_dim
    return total


def _window(module: Any, config: Any) -> int | None:
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = types[index] if types and index is not None and index < len(types) else None
    if kind == "chunked_attention":
        return -int(config.attention_chunk_size)
    if kind == "sliding_attention" or kind is None:
        window = getattr(module, "sliding_window", None) or (kind and config.sliding_window)
        return int(window) if window else None
    return None


def _pairs(tokens: int, window: int | None, causal: bool) -> int:
    """Pairs of a token and one that it sees; a negative window is a chunk."""
    if not causal:
        return tokens * tokens
    if window is not None and window < 0:
        whole, rest = divmod(tokens, -window)
        return whole * _pairs(-window, None, True) + _pairs(rest, None, True)
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def _tower_forward(tower: Any, batch: Mapping[str, Any]) -> tuple[float, float]:
    """Operations of a tower for all of its pictures, videos or sounds, forward; and those of its first convolution."""
    config, first = tower.config, 0.0
    items = _items(tower, batch)
    if not items:
        return 0, 0
    rows = sum(items)
    merged = (getattr(config, "spatial_merge_size", None) or 1) ** 2
    total = 0.0
    for name, module in tower.named_modules():
        if re.match(r"(.*\.)?(head|pooler)\.", name):  # pools a picture into one vector, which text models do not use
            continue
        if isinstance(module, nn.Conv1d):  # of sounds, of which the second takes every second frame
            own = 2.0 * module.weight.numel() * rows * (2 if module.stride[0] == 1 else 1)
        else:
            own = _products(module, rows / merged if "merger" in name else rows, config)
        if isinstance(module, nn.modules.conv._ConvNd) and not first:
            first = own
        total += own
    width = getattr(config, "hidden_size", None) or config.d_model
    width = getattr(config, "embed_dim", None) if type(config).__name__ == "Qwen2VLVisionConfig" else width
    layers = sum("Attention" in type(m).__name__ and _innermost(m) for m in tower.modules())
    windows = getattr(config, "fullatt_block_indexes", None)
    full = layers if windows is None else len(windows)
    total += 4 * width * full * sum(n * n for n in items)  # type: ignore[operator]
    if full < layers:
        side = config.window_size // config.patch_size
        inner = (side * side) or 1
        total += 4 * width * (layers - full) * sum(n // inner * inner**2 + (n % inner) ** 2 for n in items)  # type: ignore[operator]
    return total, first


def _innermost(module: nn.Module) -> bool:
    return not any("Attention" in type(m).__name__ for m in module.modules() if m is not module)


def _items(tower: Any, batch: Mapping[str, Any]) -> list[int]:
    """Rows (patches, frames) of each picture, frame of a video, or sound that goes through a tower."""
    audio = re.search("audio|whisper|speech", type(tower).__name__, re.IGNORECASE)
    if audio:
        features: Tensor | None = batch.get("input_features")
        if features is None:
            return []
        mask = batch.get("feature_attention_mask")
        frames = [features.shape[-1]] * features.shape[0] if mask is None else mask.sum(-1).tolist()
        return [(int(n) + 1) // 2 for n in frames]  # the second convolution takes every second frame
    grids = [grid for key in ("image_grid_thw", "video_grid_thw") if (grid := batch.get(key)) is not None]
    if grids:
        return [h * w for t, h, w in torch.cat(grids).tolist() for _ in range(t)]
    pixels = batch.get("pixel_values")
    if pixels is None:
        return []
    patch = tower.config.patch_size
    return [(pixels.shape[-1] // patch) * (pixels.shape[-2] // patch)] * (
        pixels.numel() // pixels[..., :3, :, :].shape[-3:].numel()
    )
