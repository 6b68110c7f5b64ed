"""Log-probabilities of the targets of a linear head whose logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veomni_models.errors import ModelError
from veomni_models.fused_cross_entropy import IGNORED, DeferredLogits, Pointwise, rows_at_once, use_fused_loss


def fused_linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    pointwise: Pointwise | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`log_softmax(pointwise(hidden @ weight.T + bias) / temperature)` at the labels, some hundreds of rows at a time.

    In the backward pass the logits are made again, part by part: each token's gradient is known only then.

    Args:
        hidden: [T, H].
        weight: [V, H].
        labels: [T] int64, already shifted; -100 gives 0.
        bias: [V].
        pointwise: applied to the float32 logits, see `fused_linear_cross_entropy`.
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
    found: Tensor = _LogProbs.apply(hidden[kept], weight, bias, labels[kept], pointwise, temperature)
    result = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    return result.masked_scatter(kept, found)


def sum_by_sample(values: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """Sums of `values` [T] over each sample of a packed row: [n] for `cu_seq_lens` int [n + 1]."""
    lengths = cu_seq_lens.diff().long()
    samples = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths.to(values.device))
    return values.new_zeros(len(lengths)).index_add(0, samples, values)


def use_log_probs(model: nn.Module) -> None:
    """Let the `loss` of a transformers model be the log-probability of each target, in place and without its logits.

    Called with `shift_labels` [B, S] (or `labels`), the model gives `loss` [B, S] float32: 0 where there is no target.
    It is computed inside the model's forward, where a sharded head is whole. See `use_fused_loss` for what is asked of
    the model.

    Raises:
        ModelError: the model has no such head, or adds the loss of a router.
    """
    refuse_router_loss(model)
    use_fused_loss(model)

    def log_probs(
        logits: DeferredLogits,
        labels: Tensor | None = None,
        vocab_size: int | None = None,  # by some models given by position
        *,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        targets = shifted(labels, shift_labels).to(logits.hidden.device)
        head = logits.head
        found = fused_linear_log_probs(
            logits.hidden.flatten(0, -2), head.weight, targets.flatten(), bias=head.bias, pointwise=logits.pointwise
        )
        return found.view(targets.shape)

    model.loss_function = log_probs


def refuse_router_loss(model: nn.Module) -> None:
    """ModelError if the model adds a loss of its own to that of its tokens."""
    config: Any = model.config
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ModelError(
            f"{type(model).__name__} adds the loss of its router to that of its tokens: set output_router_logits to "
            f"false in its config"
        )


def shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """`shift_labels`, or without them `labels` moved by one; -100 at the last position."""
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


class _LogProbs(torch.autograd.Function):
    """[N, H] -> [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        pointwise: Pointwise | None,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.pointwise, ctx.temperature = pointwise, temperature
        result = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        rows = rows_at_once(weight.shape[0])
        for at in range(0, len(labels), rows):
            part = slice(at, at + rows)
            logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
            logits = (pointwise(logits) if pointwise else logits) / temperature
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
            with torch.enable_grad():
                before = torch.nn.functional.linear(hidden[part], weight, bias).float().detach().requires_grad_()
                logits = ctx.pointwise(before) if ctx.pointwise else before
            grad = (logits.detach() / ctx.temperature).softmax(-1).neg_()
            grad.scatter_add_(-1, labels[part, None], torch.ones_like(grad[:, :1]))
            grad *= gradients[0][part, None] / ctx.temperature
            if ctx.pointwise:
                (grad,) = torch.autograd.grad(logits, before, grad)
            grad = grad.to(hidden.dtype)
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
            None,
        )
