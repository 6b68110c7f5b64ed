"""What a parallel wrapper has to know about a model, as plain data."""

from __future__ import annotations

from torch import nn


def plan_for(model: nn.Module) -> dict[str, list[str]]:
    """`shard_units`: class names of the blocks that transformers never splits, of this model and its parts."""
    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    present = {type(module).__name__ for module in model.modules()}
    return {"shard_units": sorted(names & present)}
