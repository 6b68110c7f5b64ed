"""Recompute a block in the backward pass instead of keeping its activations."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from veomni_parallel.errors import ParallelError


@dataclass(frozen=True)
class SelectiveCheckpointing:
    """Recompute everything but the results of some operators.

    They are given by name, "aten.mm" for all overloads of `torch.ops.aten.mm`. The default keeps what costs most to
    compute: matrix products and attention kernels.
    """

    keep: tuple[str, ...] = (
        "aten.mm",
        "aten.addmm",
        "aten.bmm",
        "aten.baddbmm",
        "aten._grouped_mm",
        "aten._scaled_mm",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_fused_attention_overrideable",
    )


Checkpointing = Literal["full", "selective"] | int | SelectiveCheckpointing


def resolve_checkpointing(given: Any) -> Checkpointing | None:
    """None, "full", "selective", n (every n-th block) or a `SelectiveCheckpointing`, checked.

    Raises:
        ParallelError: anything else, or an operator that torch does not have.
    """
    if given is None or given == "full":
        return given
    if given == "selective":
        return SelectiveCheckpointing()
    if isinstance(given, SelectiveCheckpointing):
        for name in given.keep:
            namespace, _, operator = name.partition(".")
            if not operator or not hasattr(getattr(torch.ops, namespace), operator):
                raise ParallelError(f"SelectiveCheckpointing.keep: torch.ops has no operator {name!r}.")
        return given
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return given
    raise ParallelError(
        f'activation_checkpointing={given!r} is none of None, "full", "selective", a number n >= 1 (every n-th block)'
        " and a SelectiveCheckpointing."
    )


def checkpoint_activations(block: nn.Module, kept: SelectiveCheckpointing | None = None) -> None:
    """Make `block` keep only its inputs (and what `kept` names) in training and run its forward again in backward.

    The forward function is replaced on the instance: names of parameters and the class stay what they are. Wrap before
    sharding, so that the gathering of parameters lies outside of what is recomputed.

    Raises:
        ParallelError: at a forward in training that hands the block a key-value cache, which would be filled twice.
    """
    forward, title = block.forward, type(block).__name__  # FSDP renames the class
    options: dict[str, Any] = {"use_reentrant": False}
    if kept is not None:
        options["context_fn"] = functools.partial(_selective_contexts, frozenset(kept.keep))

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise ParallelError(
                f"{title} is recomputed in backward (activation_checkpointing) and would fill its"
                " key-value cache twice: call the model with use_cache=False."
            )
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = recomputed


def _selective_contexts(keep: frozenset[str]) -> Any:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operator).rpartition(".")[0]  # "aten.mm.default" -> "aten.mm"
        return CheckpointPolicy.MUST_SAVE if name in keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
