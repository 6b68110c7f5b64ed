"""Models that only say something: the reference of preference optimization, a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from veomni_config import DistillRecipeConfig, RecipeConfig
from veomni_models import build_foundation_model, plan_for
from veomni_parallel import ParallelPlan, ParallelState, build_parallelize_model

from veomni_recipes.layout import wrapping
from veomni_recipes.weights import fill_foundation


def teacher_of(cfg: DistillRecipeConfig) -> DistillRecipeConfig:
    """The configuration with the teacher in the place of the student."""
    path = cfg.model.teacher_path
    teacher = {"model_path": path, "config_path": path, "foundation": {}, "lora_config": {}}
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=teacher)})


def build_frozen(cfg: RecipeConfig, device: torch.device) -> nn.Module:
    """The model of the configuration without adapters, on meta or with its weights; nothing in it learns."""
    model: Any = build_foundation_model(
        cfg.model.config_path,
        cfg.model.model_path,
        overrides=cfg.model.foundation,
        attn_implementation=cfg.model.attn_implementation,
        moe_implementation=cfg.model.moe_implementation,
        init_device="meta" if cfg.train.init_device == "meta" else device.type,
        seed=cfg.train.seed,
    )
    model.requires_grad_(False)
    return model.eval()


def spread_frozen(model: nn.Module, cfg: RecipeConfig, state: ParallelState, device: torch.device) -> nn.Module:
    """Spread what `build_frozen` made over the ranks as the model that learns, and give it its weights."""
    options = {**wrapping(cfg.train), "activation_checkpointing": None}
    if options["mode"] == "fsdp1":
        options["mode"] = "fsdp2"  # the same shards, of which a single weight can be gathered
    units = [*plan_for(model)["shard_units"], *cfg.model.basic_modules]
    model = build_parallelize_model(model, state, plan=ParallelPlan(shard_units=units or None), **options)
    fill_foundation(model, cfg, device)
    return model.eval()
