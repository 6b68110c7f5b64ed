"""The optimizer of a run, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from veomni_config import ConfigError, Problem, TrainConfig

from veomni_recipes.adafactor import Adafactor
from veomni_recipes.anyprecision_adamw import AnyPrecisionAdamW
from veomni_recipes.muon import Muon


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    no_decay_modules: Sequence[str] = (),
    no_decay_params: Sequence[str] = (),
    param_lrs: Mapping[str, float] = {},
    optimizer: str = "adamw",
    muon: Mapping[str, Any] = {},
) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters, which have their values (none is on the meta device).

    Args:
        model: wrapped or not.
        lr: learning rate.
        weight_decay: of all parameters but the following.
        no_decay_modules: class names of modules whose own parameters do not decay.
        no_decay_params: substrings of the names of parameters that do not decay.
        param_lrs: learning rates of their own by globs of names; the last that matches counts.
        optimizer: a value of `train.optimizer`.
        muon: what `TrainConfig.muon_options` returns, for `optimizer="muon"`.

    Raises:
        ConfigError: a glob that matches no parameter, a library that is not installed, or no matrices for Muon.
    """
    spared = {
        id(p)
        for module in model.modules()
        if type(module).__name__ in no_decay_modules
        for p in module.parameters(recurse=False)
    }
    matrices = hidden_matrices(model) if optimizer == "muon" else set()
    matrix_lr, matrix_decay = muon.get("lr"), muon.get("weight_decay")
    names = {plain_name(name): p for name, p in model.named_parameters()}
    check_globs("train.param_lrs", param_lrs, names)
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, p in names.items():
        if p.requires_grad:
            plain, matrix = id(p) in spared or any(part in name for part in no_decay_params), id(p) in matrices
            usual = matrix_lr if matrix and matrix_lr is not None else lr
            peak = [usual, *(own for glob, own in param_lrs.items() if fnmatchcase(name, glob))][-1]
            groups.setdefault((peak, plain, matrix), []).append(p)

    def described(of_matrices: bool) -> list[dict[str, Any]]:
        decay = matrix_decay if of_matrices and matrix_decay is not None else weight_decay
        return [
            {"params": params, "weight_decay": 0.0 if plain else decay, "scale": peak / lr if lr else 1.0}
            for (peak, plain, matrix), params in sorted(groups.items(), key=lambda group: (group[0][0] != lr, group[0]))
            if matrix == of_matrices
        ]

    if optimizer == "adamw":
        return torch.optim.AdamW(described(False), lr=lr, fused=True)
    if optimizer == "anyprecision_adamw":
        return AnyPrecisionAdamW(described(False), lr=lr)
    if optimizer == "adafactor":
        return Adafactor(described(False), lr=lr)
    if optimizer == "adamw_8bit":
        return _adamw_8bit(described(False), lr)
    if not described(True):
        text = "muon finds no matrix of a hidden layer that learns: set it to adamw"
        raise ConfigError([Problem("train.optimizer", text)])
    options = {key: value for key, value in muon.items() if key not in ("lr", "weight_decay", "ns_dtype")}
    dtype = getattr(torch, muon.get("ns_dtype", "bfloat16"))
    return Muon(described(True), described(False), lr=lr, ns_dtype=dtype, **options)


def hidden_matrices(model: nn.Module) -> set[int]:
    """The ids of the parameters that Muon is meant for: weights of linear layers [m, n], and of experts [E, m, n].

    Not embeddings and heads, whose rows belong to tokens, nor convolutions, biases and other parameters, of which only
    some are matrices.
    """
    spared, found = set(), set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Embedding):
            spared |= {id(p) for p in own.values()}
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        if head is not None:
            spared |= {id(p) for p in head.parameters()}
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found |= {id(p) for name, p in own.items() if p.ndim in (2, 3) and name.endswith(("weight", "proj"))}
    return found - spared


def _adamw_8bit(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """torchao's AdamW with quantised states, which are there from the start, for checkpoints to load into."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        text = "adamw_8bit needs torchao: pip install torchao, or set it to adamw"
        raise ConfigError([Problem("train.optimizer", text)]) from error
    optimizer = AdamW8bit(groups, lr=lr)
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {"exp_avg": optimizer._new_buffer(p, True), "exp_avg_sq": optimizer._new_buffer(p, False)}
            optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    if all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"]):
        # it compiles a kernel for each shape, which takes seconds on a CPU
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


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
    `wsd` stays at `lr` until `lr_stable_ratio` of them and then goes down linearly (https://arxiv.org/abs/2404.06395).
    """
    warmup, end = round(total_steps * train.lr_warmup_ratio), round(total_steps * train.lr_decay_ratio)
    if step <= warmup:
        return train.lr_start + (train.lr - train.lr_start) * step / warmup
    if train.lr_decay_style == "constant":
        return train.lr
    start = round(total_steps * train.lr_stable_ratio) if train.lr_decay_style == "wsd" else warmup
    done = min(1.0, max(0, step - start) / max(1, end - start))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if train.lr_decay_style == "cosine" else 1.0 - done
    return train.lr_min + (train.lr - train.lr_min) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the step; groups with a peak of their own get theirs in proportion."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's compiled steps read it from there
            group["lr"].fill_(lr * group["scale"])
        else:
            group["lr"] = lr * group["scale"]
