"""Log-probabilities of the targets of a linear head whose logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veomni_models.fused_cross_entropy import IGNORED, rows_at_once


def fused_linear_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """`log_softmax((hidden @ weight.T + bias) / temperature)` at the labels, some hundreds of rows at a time.

    In the backward pass the logits are made again, part by part: each token's gradient is known only then.

    Args:
        hidden: [T, H].
        weight: [V, H].
        labels: [T] int64, already shifted; -100 gives 0.
        bias: [V].
        temperature: what the logits are divided by.

    Returns:
        [T] float32.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if hidden.ndim != 2 or hidden.shape[1:] != weight.shape[1:] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} must be "
            f"[T, H], [V, H] and [T]"
        )
    kept = labels != IGNORED
    found: Tensor = _LogProbs.apply(hidden[kept], weight, bias, labels[kept], temperature)
    result = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    return result.masked_scatter(kept, found)


def sum_by_sample(values: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """Sums of `values` [T] over each sample of a packed row: [n] for `cu_seq_lens` int [n + 1]."""
    lengths = cu_seq_lens.diff().long()
    samples = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths.to(values.device))
    return values.new_zeros(len(lengths)).index_add(0, samples, values)


class _LogProbs(torch.autograd.Function):
    """[N, H] -> [N]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.temperature = temperature
        result = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        rows = rows_at_once(weight.shape[0])
        for at in range(0, len(labels), rows):
            part = slice(at, at + rows)
            logits = _logits(hidden[part], weight, bias, temperature)
            target = logits.gather(-1, labels[part, None]).squeeze(-1)
            result[part] = target - logits.logsumexp(-1)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        rows = rows_at_once(weight.shape[0])
        for at in range(0, len(labels), rows):
            part = slice(at, at + rows)
            logits = _logits(hidden[part], weight, bias, ctx.temperature)
            grad = logits.softmax(-1).neg_()
            grad.scatter_add_(-1, labels[part, None], torch.ones_like(grad[:, :1]))
            grad = (grad * (gradients[0][part, None] / ctx.temperature)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight.to(grad.dtype)
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float().div_(temperature)
