"""What a parallel wrapper has to know about a model, as plain data."""

from __future__ import annotations

from collections import Counter

from torch import nn


def plan_for(model: nn.Module) -> dict[str, list[str]]:
    """How to shard a model: `shard_units` are the class names of its repeated blocks.

    They are those that transformers itself never splits, of this model and of the models in it, and that occur more
    than once: a unit that occurs once is gathered with what stands around it.
    """
    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    counts = Counter(type(module).__name__ for module in model.modules())
    return {"shard_units": sorted(name for name in names if counts[name] > 1)}
