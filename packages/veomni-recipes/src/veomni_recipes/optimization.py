"""Optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from veomni_config import TrainConfig


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    no_decay_modules: Sequence[str] = (),
    no_decay_params: Sequence[str] = (),
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters.

    Args:
        model: wrapped or not.
        lr: learning rate.
        weight_decay: of all parameters but the following.
        no_decay_modules: class names of modules whose own parameters do not decay.
        no_decay_params: substrings of the names of parameters that do not decay.
    """
    spared = {
        id(p)
        for module in model.modules()
        if type(module).__name__ in no_decay_modules
        for p in module.parameters(recurse=False)
    }
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            plain = id(p) in spared or any(part in name for part in no_decay_params)
            (no_decay if plain else decay).append(p)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)


def learning_rate(step: int, total_steps: int, train: TrainConfig) -> float:
    """The learning rate of a step (from 1): linear warm-up, then `lr_decay_style` down to `lr_min`.

    Warm-up takes `lr_warmup_ratio` of all steps, from `lr_start` to `lr`; decay ends after `lr_decay_ratio` of them.
    """
    warmup, end = round(total_steps * train.lr_warmup_ratio), round(total_steps * train.lr_decay_ratio)
    if step <= warmup:
        return train.lr_start + (train.lr - train.lr_start) * step / warmup
    if train.lr_decay_style == "constant":
        return train.lr
    done = min(1.0, (step - warmup) / max(1, end - warmup))
    left = 1.0 - done if train.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return train.lr_min + (train.lr - train.lr_min) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
