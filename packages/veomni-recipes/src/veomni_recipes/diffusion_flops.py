"""Floating-point operations of a diffusion transformer, counted by torch on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from veomni_recipes.diffusion_data import conditions_of
from veomni_recipes.diffusion_transformers import family_of


class DiffusionFlops:
    """Counts the matrix products, convolutions and attention of one forward and backward over a batch.

    Samples of a batch do not meet in the model, so that one sample of each shape is counted, once. A part that is
    frozen has no gradients of its weights, and attention is counted whole, as it has no causal mask.

    Args:
        config: the transformer's.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._known: dict[tuple[Any, ...], tuple[int, int]] = {}

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], *, recompute: bool = False) -> int:
        """The operations of a batch of `stack_samples`.

        Args:
            model: on the meta device.
            recompute: forward runs once more in backward.
        """
        one = {"latents": batch["latents"][:1], **{name: v[:1] for name, v in conditions_of(batch).items()}}
        one = {name: value.to("meta") for name, value in one.items()}
        shapes = tuple((name, *value.shape) for name, value in one.items())
        if shapes not in self._known:
            self._known[shapes] = self._count(model, one)
        forward, both = self._known[shapes]
        return len(batch["latents"]) * (both + recompute * forward)

    def _count(self, model: nn.Module, one: Mapping[str, Any]) -> tuple[int, int]:
        family, time = family_of(self._config["_class_name"]), torch.zeros(1, dtype=torch.int64, device="meta")
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            out = family.predict(model, self._config, one["latents"], time, conditions_of(one), 1.0)
            forward = counter.get_total_flops()
            out.sum().backward()
        model.zero_grad()
        return forward, counter.get_total_flops()
