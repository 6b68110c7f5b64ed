"""Cross-entropy of a linear head whose logits never exist as a whole, and its place in any transformers model."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veomni_models.errors import ModelError

IGNORED = -100
_LOGITS_AT_ONCE = 1 << 25  # elements: 128 MB in float32, 220 rows of a vocabulary of 151,936

Pointwise = Callable[[Tensor], Tensor]


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: int | float | Tensor,
    *,
    bias: Tensor | None = None,
    pointwise: Pointwise | None = None,
    z_loss: float = 0.0,
    group: dist.ProcessGroup | None = None,
    keep_rows: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """`cross_entropy(pointwise(hidden @ weight.T + bias), labels, reduction="sum") / num_items` in little memory.

    Rows whose label is -100 are left out before the head. The others go through it some hundreds at a time; their
    gradients are made there and then, so that no more logits than those exist in forward and backward. Logits are
    float32, whatever the dtype of the product.

    Args:
        hidden: [T, H].
        weight: [V, H]; with `group` this rank's [V / P, H], in the order of ranks.
        labels: [T] int64, already shifted, -100 where nothing is learnt.
        num_items: what the sum is divided by: targets of the whole step.
        bias: [V], sharded as `weight`.
        pointwise: applied to the float32 logits, such as `lambda x: 30 * torch.tanh(x / 30)` for a soft-cap.
        z_loss: factor of the sum of squared log-partition functions that is added (PaLM, arXiv 2204.02311, section 5).
        group: ranks that hold the shards of the vocabulary; `hidden` and `labels` are the same on all of them.
        keep_rows: called with the loss of each row, [T] float32, 0 where nothing is learnt.

    Returns:
        The loss, a float32 scalar; 0 (with gradients of zero) if nothing is to be learnt.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} must be "
            f"[T, H], [V, H] and [T]"
        )
    kept = labels != IGNORED
    chosen = hidden[kept]
    rows = chosen.new_zeros(len(chosen), dtype=torch.float32) if keep_rows else None
    args = (chosen, weight, bias, labels[kept], pointwise, z_loss, group, rows)
    total: Tensor = _LinearCrossEntropy.apply(*args)
    if keep_rows is not None and rows is not None:
        keep_rows(rows.new_zeros(len(labels)).masked_scatter_(kept, rows))
    return total / num_items


def rows_at_once(vocabulary: int) -> int:
    """How many rows go through the head together, so that their float32 logits take 128 MB."""
    return max(1, _LOGITS_AT_ONCE // vocabulary)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum over rows; the gradients of hidden [N, H], weight and bias are made with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        pointwise: Pointwise | None,
        z_loss: float,
        group: dist.ProcessGroup | None,
        losses: Tensor | None,
    ) -> Tensor:
        first = 0 if group is None else dist.get_rank(group) * weight.shape[0]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = rows_at_once(weight.shape[0])
        for at in range(0, len(labels), rows):
            part = hidden[at : at + rows]
            logits = torch.nn.functional.linear(part, weight, bias).float()
            loss, grad = _loss_and_gradient(logits, labels[at : at + rows] - first, pointwise, z_loss, group)
            total += loss.sum()
            if losses is not None:
                losses[at : at + rows] = loss
            grad = grad.to(part.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight.to(part.dtype), out=grad_hidden[at : at + rows])
            if grad_weight is not None:
                if part.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, part)
                else:
                    grad_weight += grad.T @ part
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        if group is not None and grad_hidden is not None:
            dist.all_reduce(grad_hidden, group=group)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * factor,
            None if grad_weight is None else (grad_weight * factor).to(weight_dtype),
            None if grad_bias is None else (grad_bias * factor).to(bias_dtype),
            *[None] * 5,
        )


def _loss_and_gradient(
    logits: Tensor, labels: Tensor, pointwise: Pointwise | None, z_loss: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The loss of each row of [N, V], and their sum's gradient for the logits before `pointwise`; uses `logits` up."""
    before = after = logits
    if pointwise is not None:
        with torch.enable_grad():
            before = logits.detach().requires_grad_()
            after = pointwise(before)
        logits = after.detach().clone()
    top = logits.amax(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    mine = (labels >= 0) & (labels < logits.shape[-1])
    places = labels.clamp(0, logits.shape[-1] - 1)[:, None]
    targets = (logits.gather(-1, places) - top).squeeze(-1) * mine
    exponentials = logits.sub_(top).exp_()
    sums = exponentials.sum(-1)
    if group is not None:
        both = torch.stack([targets, sums])
        dist.all_reduce(both, group=group)
        targets, sums = both
    logs = sums.log()
    partition = logs + top.squeeze(-1)  # log of the sum of exponentials
    loss = logs - targets + z_loss * partition.square()
    factors = (1 + 2 * z_loss * partition) / sums
    gradient = exponentials.mul_(factors[:, None])
    gradient.scatter_add_(-1, places, -mine.to(gradient.dtype)[:, None])
    if pointwise is not None:
        (gradient,) = torch.autograd.grad(after, before, gradient)
    return loss, gradient


def use_fused_loss(model: nn.Module, *, z_loss: float = 0.0, group: dist.ProcessGroup | None = None) -> None:
    """Let a transformers model compute its loss by `fused_linear_cross_entropy`, in place.

    Whenever the model is called with `labels` or `shift_labels`, its output head gives a stand-in for the logits; what
    the model does to it (scaling, soft-cap, casts) is noted and done to each part of the logits, and `output.logits` is
    None. Without labels, as in generation, nothing changes. Under FSDP the head must be in the unit of the whole model
    or in none of its own.

    Args:
        model: with `get_output_embeddings()`, a linear layer, and transformers' `loss_function`.
        z_loss, group: see `fused_linear_cross_entropy`.

    Raises:
        ModelError: the model has no such head; in a step, that it does to its logits what is not known here.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear) or not hasattr(type(model), "loss_function"):
        raise ModelError(
            f"{type(model).__name__}: its output head is {type(head).__name__}, but the fused loss needs a Linear and "
            f"a loss_function that transformers calls"
        )
    wanted = False
    plain = head.forward

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal wanted
        wanted = any(kwargs.get(key) is not None for key in ("labels", "shift_labels"))

    def forward(hidden: Tensor) -> Any:
        return DeferredLogits(hidden, head) if wanted else plain(hidden)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(getattr(output, "logits", None), DeferredLogits):
            output.logits = None
        return output

    def loss(
        logits: DeferredLogits,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        keep_rows: Callable[[Tensor], None] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.hidden.device)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return fused_linear_cross_entropy(
            logits.hidden.flatten(0, -2),
            logits.head.weight,
            targets,
            count,
            bias=logits.head.bias,
            pointwise=logits.pointwise,
            z_loss=z_loss,
            group=group,
            keep_rows=keep_rows,
        )

    loss.keeps_rows = True  # type: ignore[attr-defined]
    head.forward = forward
    model.loss_function = loss
    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after)


class DeferredLogits:
    """Stands for the logits [..., V] of `head(hidden)`; operations on it are noted, not done."""

    def __init__(self, hidden: Tensor, head: nn.Linear, steps: tuple[Pointwise, ...] = ()) -> None:
        self.hidden = hidden
        self.head = head
        self._steps = steps

    @property
    def pointwise(self) -> Pointwise | None:
        """What is to be done to the logits, as one function; None if nothing."""
        if not self._steps:
            return None

        def all_steps(logits: Tensor) -> Tensor:
            for step in self._steps:
                logits = step(logits)
            return logits

        return all_steps

    @property
    def shape(self) -> torch.Size:
        """[..., V]."""
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states."""
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        """That of the hidden states."""
        return self.hidden.device

    def then(self, step: Pointwise) -> DeferredLogits:
        """The same logits with one more operation on them."""
        return DeferredLogits(self.hidden, self.head, (*self._steps, step))

    def float(self) -> DeferredLogits:
        """As they are: logits are float32 anyway."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        """As they are: logits are float32 and stay on their device."""
        return self

    def contiguous(self) -> DeferredLogits:
        """As they are."""
        return self

    def tanh(self) -> DeferredLogits:
        """Their hyperbolic tangent."""
        return self.then(torch.tanh)

    def __mul__(self, factor: Any) -> DeferredLogits:
        return self._with_number(operator.mul, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits:
        return self._with_number(operator.truediv, divisor)

    def __getattr__(self, name: str) -> Any:
        raise _unknown(name)

    def __getitem__(self, index: Any) -> Any:
        raise _unknown("indexing")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Operations of torch on the stand-in: those that are known are noted."""
        name = getattr(function, "__name__", str(function))
        if name == "tanh":
            return args[0].tanh()
        if name in ("mul", "div", "true_divide", "__rmul__") and len(args) == 2 and not kwargs:
            logits, other = args if isinstance(args[0], cls) else reversed(args)
            return logits / other if name in ("div", "true_divide") else logits * other
        raise _unknown(name)

    def _with_number(self, operation: Callable[[Any, Any], Any], number: Any) -> DeferredLogits:
        if isinstance(number, Tensor):
            if number.numel() != 1 or number.requires_grad:
                raise _unknown(f"{operation.__name__} by a tensor")
            number = number.detach()
        return self.then(lambda logits: operation(logits, number))


def _unknown(name: str) -> ModelError:
    return ModelError(f"the model does {name} to its logits, which the fused loss does not know: use the plain loss")
