"""Cross-entropy over logits whose vocabulary is divided over ranks, without joining them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from veomni_parallel.errors import ParallelError
from veomni_parallel.mesh import Mesh


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, group: Any, ignore_index: int) -> torch.Tensor:
        width = logits.shape[-1]
        local = targets - width * dist.get_rank(group)
        elsewhere = (local < 0) | (local >= width)
        ignored = targets == ignore_index
        largest = logits.max(dim=-1).values
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - largest[..., None]
        chosen = shifted.gather(-1, local.masked_fill(elsewhere, 0)[..., None])[..., 0].masked_fill(elsewhere, 0)
        powers = shifted.exp_()
        sums = torch.stack([powers.sum(-1), chosen])  # the chosen logit lies on one rank, elsewhere it is 0
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(powers.div_(sums[0][..., None]), local, elsewhere, ignored)
        return (sums[0].log() - sums[1]).masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        probabilities, local, elsewhere, ignored = ctx.saved_tensors
        out = probabilities.clone()
        ours = torch.where(elsewhere, 0.0, -1.0).to(out.dtype)
        out.scatter_add_(-1, local.masked_fill(elsewhere, 0)[..., None], ours[..., None])
        return out * gradient.masked_fill(ignored, 0)[..., None], None, None, None


def vocabulary_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, group: Any, *, ignore_index: int = -100
) -> torch.Tensor:
    """Cross-entropy of each position, float32, as `F.cross_entropy(..., reduction="none")` of the joined logits.

    Args:
        logits: [..., V / P], this rank's part of the vocabulary, in the order of ranks; computed in float32.
        targets: int64 [...], ids of the whole vocabulary, equal on all ranks.
        group: the ranks that hold the parts.
        ignore_index: target of positions that count 0.

    Returns:
        float32 [...], equal on all ranks; each rank gets the gradient of its own logits.
    """
    return _CrossEntropy.apply(logits.float(), targets, group, ignore_index)


def use_vocabulary_parallel_loss(model: nn.Module, mesh: Mesh) -> None:
    """Make a transformers model compute its causal loss from logits [..., V / P]; its output holds these.

    Raises:
        ParallelError: the model has no `loss_function` to replace.
    """
    if not hasattr(model, "loss_function"):
        raise ParallelError(
            f"{type(model).__name__} has no loss_function that could take divided logits: give its head the style"
            ' "colwise_gather_output", or call vocabulary_parallel_cross_entropy.'
        )
    group: Any = mesh.get_group()

    def loss_function(
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.to(logits.device)
        losses = vocabulary_parallel_cross_entropy(logits, targets, group, ignore_index=ignore_index)
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / (count.to(losses.device) if isinstance(count, torch.Tensor) else count)

    model.loss_function = loss_function
