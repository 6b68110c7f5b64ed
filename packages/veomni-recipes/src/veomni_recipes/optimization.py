"""Optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from veomni_config import ConfigError, Problem, TrainConfig


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    no_decay_modules: Sequence[str] = (),
    no_decay_params: Sequence[str] = (),
    param_lrs: Mapping[str, float] = {},
) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters.

    Args:
        model: wrapped or not.
        lr: learning rate.
        weight_decay: of all parameters but the following.
        no_decay_modules: class names of modules whose own parameters do not decay.
        no_decay_params: substrings of the names of parameters that do not decay.
        param_lrs: learning rates of their own by globs of names; the last that matches counts.

    Raises:
        ConfigError: a glob that matches no parameter.
    """
    spared = {
        id(p)
        for module in model.modules()
        if type(module).__name__ in no_decay_modules
        for p in module.parameters(recurse=False)
    }
    names = {plain_name(name): p for name, p in model.named_parameters()}
    check_globs("train.param_lrs", param_lrs, names)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in names.items():
        if p.requires_grad:
            plain = id(p) in spared or any(part in name for part in no_decay_params)
            peak = [lr, *(own for glob, own in param_lrs.items() if fnmatchcase(name, glob))][-1]
            groups.setdefault((peak, plain), []).append(p)
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": 0.0 if plain else weight_decay, "scale": peak / lr if lr else 1.0}
            for (peak, plain), params in sorted(groups.items(), key=lambda group: (group[0][0] != lr, group[0]))
        ],
        lr=lr,
        fused=True,
    )


def plain_name(name: str) -> str:
    """The name that a parameter has in a model that is not wrapped."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def check_globs(key: str, globs: Iterable[str], names: Collection[str]) -> None:
    """ConfigError for a glob that matches none of the names."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            text = f"{glob!r} matches no parameter of the model; their names begin with {', '.join(parts)}"
            raise ConfigError([Problem(key, text)])


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
    """The learning rate of the step; groups with a peak of their own get theirs in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
