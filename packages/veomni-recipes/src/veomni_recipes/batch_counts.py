"""How much a micro-batch holds, be it rows of tokens or stacked latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import veomni_parallel

if TYPE_CHECKING:
    from veomni_data import Batch


def count_tokens(micro_batches: Sequence[Batch]) -> int:
    """Tokens of this rank's micro-batches, without padding; of latents those that the transformer makes of them."""
    return sum(map(_tokens, micro_batches))


def _tokens(batch: Batch) -> int:
    if "latents" in batch:
        return int(batch["tokens"])
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def count_targets(micro_batches: Sequence[Batch]) -> int:
    """What the loss of this rank's micro-batches is a mean over: tokens with a target, or numbers of latents."""
    if all("latents" in batch for batch in micro_batches):
        return sum(batch["latents"].numel() for batch in micro_batches)
    return veomni_parallel.count_targets(micro_batches)


def count_samples(batch: Batch) -> int:
    """Samples of a micro-batch: latents, segments of a packed row, or rows."""
    if "latents" in batch:
        return len(batch["latents"])
    if "cu_seq_lens_q" in batch:
        return len(batch["cu_seq_lens_q"]) - 1
    if "attention_mask" in batch:
        return len(batch["input_ids"])
    return int((batch["position_ids"].reshape(-1, batch["input_ids"].shape[-1])[0] == 0).sum())
