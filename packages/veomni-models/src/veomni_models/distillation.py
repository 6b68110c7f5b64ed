"""Learning from a teacher's distribution over the vocabulary, without holding its logits or the student's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veomni_models.fused_cross_entropy import IGNORED, rows_at_once


def fused_linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    num_items: int | float | Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """The sum over targets of temperature^2 * KL(teacher || student), divided by `num_items`.

    Both distributions are softmax(hidden @ weight.T / temperature), as in Hinton et al., arXiv 1503.02531; the square
    keeps the size of the gradient. Some hundreds of rows at a time are made, with their gradients.

    Args:
        hidden: [T, H] of the student.
        weight: [V, H] of the student's head.
        teacher_hidden, teacher_weight: [T, H'] and [V, H'] of the teacher; they get no gradient.
        labels: [T] int64, already shifted; where they are -100 nothing is learnt.
        num_items: targets of the whole step.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    fits = hidden.shape[1:] == weight.shape[1:] and teacher_hidden.shape[1:] == teacher_weight.shape[1:]
    if (
        not fits
        or weight.shape[0] != teacher_weight.shape[0]
        or not hidden.shape[0] == len(teacher_hidden) == len(labels)
    ):
        raise ValueError(
            f"student {list(hidden.shape)} x {list(weight.shape)}, teacher {list(teacher_hidden.shape)} x "
            f"{list(teacher_weight.shape)} and labels {list(labels.shape)} must share T and V"
        )
    kept = labels != IGNORED
    total: Tensor = _Distillation.apply(
        hidden[kept], weight, teacher_hidden[kept].detach(), teacher_weight.detach(), temperature
    )
    return total / num_items


class _Distillation(torch.autograd.Function):
    """The sum over rows; the gradients of hidden [N, H] and weight are made with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = rows_at_once(weight.shape[0])
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            student = ((hidden[part] @ weight.T).float() / temperature).log_softmax(-1)
            teacher = ((teacher_hidden[part] @ teacher_weight.T).float() / temperature).log_softmax(-1)
            probabilities = teacher.exp()
            total += temperature**2 * (probabilities * (teacher - student)).sum()
            grad = (student.exp_().sub_(probabilities) * temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight.to(grad.dtype)
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        ctx.dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * gradients[0],
            None if grad_weight is None else (grad_weight * gradients[0]).to(ctx.dtype),
            None,
            None,
            None,
        )
