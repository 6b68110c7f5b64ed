"""The loss of each token, kept on the way to the sum of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from veomni_models.errors import ModelError
from veomni_models.fused_cross_entropy import IGNORED


class TokenLosses:
    """The loss of each token of the last forward passes, which `take` hands over.

    Made by `keep_token_losses`.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def keep(self, losses: Tensor) -> None:
        """Note the losses of a forward pass, [T] float32."""
        self._kept.append(losses.detach())

    def take(self) -> list[Tensor]:
        """Those of each forward pass since the last call, [B * S] float32: 0 where there is no target."""
        kept, self._kept = self._kept, []
        return kept


def keep_token_losses(model: nn.Module) -> TokenLosses:
    """Let a transformers model, wrapped or not, keep the loss of each token when it computes its loss.

    Loss and gradients are as before. Call it after `use_fused_loss`, if that is used. Losses of pictures that are drawn
    by a flow are not among those of the tokens.

    Raises:
        ModelError: the model has a loss of its own, which is not the cross-entropy of its tokens.
    """
    inner: Any = _unwrapped(_unwrapped(model, "module"), "foundation")
    plain = getattr(inner, "loss_function", None)
    losses = TokenLosses()
    if getattr(plain, "keeps_rows", False):
        inner.loss_function = _fused(plain, losses)
    elif plain is ForCausalLMLoss:
        inner.loss_function = _cross_entropy(losses)
    else:
        name = getattr(plain, "__name__", "none")
        raise ModelError(f"{type(inner).__name__}: its loss ({name}) is not the cross-entropy of its tokens")
    return losses


def _unwrapped(model: Any, name: str) -> Any:
    while isinstance(getattr(model, name, None), nn.Module):
        model = getattr(model, name)
    return model


def _fused(plain: Any, losses: TokenLosses) -> Any:
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        return plain(*args, keep_rows=losses.keep, **kwargs)

    return loss


def _cross_entropy(losses: TokenLosses) -> Any:
    def loss(
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        rows = nn.functional.cross_entropy(
            logits.float().view(len(targets), -1), targets, ignore_index=ignore_index, reduction="none"
        )
        losses.keep(rows)
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return rows.sum() / (count.to(rows.device) if isinstance(count, torch.Tensor) else count)

    return loss
