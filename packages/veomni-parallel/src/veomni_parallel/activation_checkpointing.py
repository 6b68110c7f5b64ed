"""Recompute a block in the backward pass instead of keeping its activations."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from veomni_parallel.errors import ParallelError


def checkpoint_activations(block: nn.Module) -> None:
    """Make `block` keep only its inputs in training and run its forward again in backward.

    The forward function is replaced on the instance: names of parameters and the class stay what they are. Wrap before
    sharding, so that the gathering of parameters lies outside of what is recomputed.

    Raises:
        ParallelError: at a forward in training that hands the block a key-value cache, which would be filled twice.
    """
    forward, title = block.forward, type(block).__name__  # FSDP renames the class

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise ParallelError(
                f"{title} is recomputed in backward (activation_checkpointing) and would fill its"
                " key-value cache twice: call the model with use_cache=False."
            )
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = recomputed
