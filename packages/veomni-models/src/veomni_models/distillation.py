"""Learning from a teacher's distribution over the vocabulary, without holding its logits or the student's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from veomni_models.errors import ModelError
from veomni_models.fused_cross_entropy import (
    IGNORED,
    DeferredLogits,
    fused_linear_cross_entropy,
    rows_at_once,
    use_fused_loss,
)
from veomni_models.log_probs import refuse_router_loss, shifted


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


class Distillation:
    """What a student of a transformers architecture learns of a teacher, both wrapped or not.

        distillation = Distillation(student, teacher, temperature=2.0, weight=0.5)   # before they are wrapped
        student, teacher = build_parallelize_model(student, ...), build_parallelize_model(teacher, ...)
        distillation.begin(student, teacher)
        student(**batch, num_items_in_batch=targets, use_cache=False).loss

    The student's `loss` is weight * `fused_linear_distillation` + (1 - weight) * the cross-entropy of its targets. It
    is computed inside the student's forward, where a sharded head is whole; of a sharded teacher the head is gathered
    for that, and let go afterwards.

    Args:
        student: of which gradients are wanted.
        teacher: which has the same vocabulary; it is frozen.
        temperature: see `fused_linear_distillation`.
        weight: share of the teacher, from 0 to 1.

    Raises:
        ModelError: vocabularies of different sizes, or a model with another head than a Linear without bias, or with a
            router's loss.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, temperature: float = 1.0, weight: float = 1.0
    ) -> None:
        self.temperature, self.weight = temperature, weight
        self._teacher: Any = None  # not before it is wrapped: who copies the student must not copy it too
        self._states: Tensor | None = None
        self._head: Tensor | None = None
        for model in (student, teacher):
            refuse_router_loss(model)
            use_fused_loss(model)
            head: Any = model.get_output_embeddings()
            if head.bias is not None:
                raise ModelError(f"{type(model).__name__}: a head with a bias is not distilled")
        sizes = [model.get_output_embeddings().out_features for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"the student has {sizes[0]} tokens and the teacher {sizes[1]}: they need the same tokenizer, and "
                f"heads of one size"
            )
        teacher.requires_grad_(False)
        student.loss_function, teacher.loss_function = self._learn, self._show

    def begin(self, student: nn.Module, teacher: nn.Module) -> None:
        """From now on the teacher reads each micro-batch before the student does; both as they were wrapped."""
        self._teacher = teacher.eval()
        student.register_forward_pre_hook(self._ask, prepend=True, with_kwargs=True)

    @torch.no_grad()
    def _ask(self, _: nn.Module, args: tuple[Any, ...], batch: dict[str, Any]) -> None:
        self._states = self._teacher(*args, **batch).loss
        plain: Any = getattr(self._teacher, "module", self._teacher)
        weight = plain.get_output_embeddings().weight
        self._head = weight.full_tensor() if isinstance(weight, DTensor) else weight

    def _show(self, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Tensor:
        """The teacher's states in place of its loss: [T, H]."""
        return _plain(logits).flatten(0, -2)

    def _learn(
        self,
        logits: DeferredLogits,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        *,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        hidden, weight = _plain(logits).flatten(0, -2), logits.head.weight
        targets = shifted(labels, shift_labels).flatten().to(hidden.device)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        states, head = self._states, self._head
        self._states = self._head = None
        if states is None or head is None:
            raise ModelError("the teacher was not asked: call Distillation.begin with the wrapped models")
        loss = self.weight * fused_linear_distillation(
            hidden, weight, states, head.to(states.dtype), targets, count, temperature=self.temperature
        )
        if self.weight < 1:
            loss = loss + (1 - self.weight) * fused_linear_cross_entropy(hidden, weight, targets, count)
        return loss


def _plain(logits: DeferredLogits) -> Tensor:
    """The states whose product with the head's weight the logits are."""
    if logits.pointwise is not None:
        raise ModelError("a model that changes its logits after its head (a soft-cap, a scale) is not distilled")
    return logits.hidden


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
