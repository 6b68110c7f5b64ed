"""Preference pairs in a packed row: the log-probabilities of their answers, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from veomni_config import DPORecipeConfig, DPOTrainConfig
from veomni_data import PackingCollator, build_dataloader, build_dataset, slice_for_sequence_parallel
from veomni_models import dpo_loss, orpo_loss, simpo_loss, sum_by_sample, without_adapters
from veomni_parallel import ParallelState, evaluated, global_sum

from veomni_recipes.distributed import to_device


class Pairs(NamedTuple):
    """The n pairs of a micro-batch.

    `losses` [n]; `margins` [n], how much better the chosen answer's reward is, and `chosen` and `rejected` [n], the
    log-probabilities of the answers, all three detached.
    """

    losses: Tensor
    margins: Tensor
    chosen: Tensor
    rejected: Tensor


def count_pairs(batch: Mapping[str, Any]) -> int:
    """Pairs of a micro-batch; none in a row that a rank gets when it has run dry."""
    return len(batch["preference"]) // 2 if "preference" in batch else 0


def answer_log_probs(model: nn.Module, batch: Mapping[str, Any], state: ParallelState) -> Tensor:
    """The log-probabilities of the answers of a packed row: the sums over each segment's targets, [segments].

    Args:
        model: one whose `loss` is the log-probability of each target (`use_log_probs`), wrapped or not.
        batch: a row, or this rank's slice of it. Ranks that share one each get the whole sums, of which their own
            tokens have the gradient: added up over the ranks it is the gradient of the row.
        state: of the run.
    """
    own: Tensor = model(**batch, use_cache=False).loss.flatten()
    before = state.sp.get_local_rank() * len(own)
    whole = pad(own, (before, (state.sp.size() - 1) * len(own) - before))
    sums = sum_by_sample(whole, batch["cu_seq_lens_q"])
    return sums + (global_sum(sums.detach(), state.sp) - sums.detach())


def compare(
    model: nn.Module,
    reference: nn.Module | None,
    batch: Mapping[str, Any],
    state: ParallelState,
    train: DPOTrainConfig,
) -> Pairs:
    """The pairs of a micro-batch under the model, and under its reference if the loss has one.

    Args:
        model: wrapped, see `answer_log_probs`.
        reference: the same; None for the model itself without its adapters.
        batch: whole row on the device, as the loader gives it.
    """
    row = {key: value for key, value in batch.items() if key != "preference"}
    answers = 2 * count_pairs(batch)
    targets = sum_by_sample((row["shift_labels"].flatten() != -100).float(), row["cu_seq_lens_q"])[:answers]
    row = slice_for_sequence_parallel(row, state.sp.get_local_rank(), state.sp.size())
    expected = None
    if train.uses_reference:
        with torch.no_grad(), _reference_of(model, reference) as other:
            expected = answer_log_probs(other, row, state)[:answers]
    # a row without a pair still goes through the model, as the ranks do that together
    found = answer_log_probs(model, row, state)[:answers]
    return Pairs(*pair_losses(found, expected, targets, train), found[0::2].detach(), found[1::2].detach())


@contextmanager
def _reference_of(model: nn.Module, reference: nn.Module | None) -> Iterator[nn.Module]:
    if reference is not None:
        yield reference
        return
    with evaluated(model), without_adapters(model):
        yield model


def pair_losses(
    found: Tensor, expected: Tensor | None, targets: Tensor, train: DPOTrainConfig
) -> tuple[Tensor, Tensor]:
    """The loss and the reward margin of each pair, [n] and [n], by `train.dpo_loss`.

    Args:
        found: [2 n] log-probabilities of the answers, each chosen one before its rejected one.
        expected: [2 n] the same under the reference; None for a loss without one.
        targets: [2 n] how many tokens each answer has, by which all but `sigmoid` average.
    """
    if train.dpo_loss == "sigmoid":
        return dpo_loss(
            *_halves(found), *_halves(expected), beta=train.dpo_beta, label_smoothing=train.dpo_label_smoothing
        )
    found = found / targets
    if train.dpo_loss == "ipo":
        expected = None if expected is None else expected / targets
        return dpo_loss(*_halves(found), *_halves(expected), beta=train.dpo_beta, kind="ipo")
    if train.dpo_loss == "simpo":
        return simpo_loss(*_halves(found), beta=train.dpo_beta, margin=train.simpo_margin)
    return orpo_loss(*_halves(found), weight=train.dpo_beta)


def _halves(values: Tensor | None) -> tuple[Any, Any]:
    return (None, None) if values is None else (values[0::2], values[1::2])


class HeldOutPairs:
    """The pairs of `data.eval_path`, by which a run is judged before, during and after.

    Args:
        cfg: of the run.
        transform: a row into a pair, as for training.
        state: of the run.
        pad_token_id: of rows.
    """

    def __init__(
        self, cfg: DPORecipeConfig, transform: Callable[..., Any], state: ParallelState, pad_token_id: int
    ) -> None:
        self._cfg, self._state, self._loader = cfg, state, None
        if cfg.data.eval_path is not None:
            self._loader = build_dataloader(
                build_dataset(cfg.data.eval_path, transform=transform, root=cfg.data.root),
                dp_rank=state.dp.get_local_rank(),
                dp_size=state.dp.size(),
                micro_batch_size=1,
                global_batch_size=state.dp.size(),
                max_seq_len=cfg.data.max_seq_len,
                collate=PackingCollator(pad_token_id),
                drop_last=False,
                group=state.dp.get_group(),
                max_skipped=cfg.data.max_skipped,
            )

    def judge(self, model: nn.Module, reference: nn.Module | None) -> dict[str, float]:
        """The means over all pairs; nothing without held-out pairs. Every rank calls it.

        Returns:
            `loss`, `margin`, `accuracy` (the share of pairs whose margin is above 0) and `ranking` (the share of pairs
            whose chosen answer is the more likely one under the model alone), with `pairs`, how many there are.
        """
        if self._loader is None:
            return {}
        sums = torch.zeros(5, dtype=torch.float64, device=self._state.device)
        self._loader.set_epoch(0)
        with torch.no_grad(), evaluated(model):
            for micro_batches in self._loader:
                for batch in micro_batches:
                    pairs = compare(
                        model, reference, to_device(batch, self._state.device), self._state, self._cfg.train
                    )
                    sums += pair_sums(pairs)
        loss, margin, right, ranked, count = global_sum(sums, self._state.dp).tolist()
        return {
            "loss": loss / count,
            "margin": margin / count,
            "accuracy": right / count,
            "ranking": ranked / count,
            "pairs": int(count),
        }


def pair_sums(pairs: Pairs) -> Tensor:
    """[5] float64: the sums of losses and margins, the pairs with a margin above 0, those ranked right, and all."""
    values = (pairs.losses.detach(), pairs.margins, pairs.margins > 0, pairs.chosen > pairs.rejected)
    sums = [value.double().sum() for value in values]
    return torch.stack([*sums, torch.full_like(sums[0], len(pairs.margins))])


def describe(figures: dict[str, float], when: str) -> str:
    """A sentence about held-out pairs; empty if there are none."""
    if not figures:
        return ""
    return (
        f"held-out pairs {when} training: loss {figures['loss']:.4f}, margin {figures['margin']:+.4f}, "
        f"{figures['accuracy']:.1%} with a margin above 0, {figures['ranking']:.1%} with the chosen answer likelier"
    )
