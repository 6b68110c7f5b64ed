"""How good a model is on held-out data while it is trained, and which checkpoint was the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from veomni_ckpt import CheckpointManager
from veomni_config import RecipeConfig
from veomni_data import PackingCollator, PaddingCollator, build_dataloader, build_dataset, slice_for_sequence_parallel
from veomni_parallel import ParallelState, count_targets, evaluated, global_sum

from veomni_recipes.distributed import barrier, to_device
from veomni_recipes.progress import Progress
from veomni_recipes.run_folder import write_json

BEST = "best.json"


class Validation:
    """Validates every `train.eval_steps` steps and `train.eval_epochs` epochs on `data.eval_path`, or never.

        if (figures := validation.after_step(progress)) is not None: ...
        if validation.is_best: ...

    `loss` is the mean over all targets of the held-out data, which does not depend on how they are spread over ranks.
    With `train.eval_answers`, `accuracy` is the share of so many questions that a model exported for it answers right.

    Args:
        cfg: of the run.
        train_data: whose samples are made in the same way.
        model: wrapped.
        state: of the run.
        pad_token_id: of rows of tokens.
        rows: how held-out samples that are no tokens become micro-batches, as arguments of `build_dataloader`.
        measure: (loader) -> figures of the held-out data, with their `loss`; None: `held_out_loss`.
        answer: gives the accuracies of answers to so many questions; for recipes whose data have answers.
        weights: in its context the model has the weights that are validated, such as averaged ones.
        arguments: what the model is called with besides a batch.
    """

    def __init__(
        self,
        cfg: RecipeConfig,
        train_data: Any,
        model: nn.Module,
        state: ParallelState,
        *,
        pad_token_id: int = 0,
        rows: Mapping[str, Any] | None = None,
        measure: Callable[[Any], dict[str, Any]] | None = None,
        answer: Callable[[int], dict[str, float]] | None = None,
        weights: Callable[[], AbstractContextManager[None]] = nullcontext,
        **arguments: Any,
    ) -> None:
        self._train, self._state, self._answer, self._weights = cfg.train, state, answer, weights
        tokens = partial(held_out_loss, model, state=state, pad_token_id=pad_token_id, arguments=arguments)
        self._measure = measure or tokens
        self._loader: Any = None
        self._best: dict[str, Any] = {}
        self._replaced: int | None = None
        self.is_best = False
        """Whether the last step was validated, and better than all before it."""
        if cfg.data.eval_path is None or not (cfg.train.eval_steps or cfg.train.eval_epochs):
            return
        packed = cfg.train.rmpad or cfg.train.rmpad_with_pos_ids
        self._loader = build_dataloader(
            build_dataset(cfg.data.eval_path, transform=train_data.sources[0].transform, root=cfg.data.root),
            dp_rank=state.dp.get_local_rank(),
            dp_size=state.dp.size(),
            micro_batch_size=cfg.train.micro_batch_size,
            global_batch_size=cfg.train.micro_batch_size * state.dp.size(),
            max_seq_len=cfg.data.max_seq_len,
            packing=cfg.train.dyn_bsz,
            drop_last=False,
            group=state.dp.get_group(),
            too_long=cfg.data.too_long,
            max_skipped=cfg.data.max_skipped,
            **(rows or {"collate": (PackingCollator if packed else PaddingCollator)(pad_token_id)}),
        )

    def after_step(self, progress: Progress) -> dict[str, Any] | None:
        """The figures of the model after a step, if it is one of those that are validated. Every rank calls it."""
        return self._if_due(progress, progress.step, self._train.eval_steps)

    def after_epoch(self, progress: Progress) -> dict[str, Any] | None:
        """The figures of the model after an epoch, if it is one of those. Every rank calls it."""
        return self._if_due(progress, progress.epoch, self._train.eval_epochs)

    def _if_due(self, progress: Progress, done: int, every: int) -> dict[str, Any] | None:
        self.is_best = False
        return self._run(progress) if self._loader is not None and every and done % every == 0 else None

    def _run(self, progress: Progress) -> dict[str, Any]:
        began = time.monotonic()
        with self._weights():
            figures = {"step": progress.step, "epoch": progress.epoch, **self._measure(self._loader)}
            if self._train.eval_answers and self._answer is not None:
                accuracies = self._answer(self._train.eval_answers)
                figures |= {"accuracy": accuracies.pop("all_accuracy"), **accuracies}
        figures["seconds"] = time.monotonic() - began
        name = self._train.best_metric
        if name is not None:
            before, sign = self._best.get(name), 1 if name == "accuracy" else -1
            self.is_best = figures[name] == figures[name] and (before is None or sign * (figures[name] - before) > 0)
            if self.is_best:
                self._replaced = self.best_step
                self._best = {"step": progress.step, name: figures[name]}
        return figures

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint so far."""
        return self._best.get("step")

    def keep_best(self, checkpoints: CheckpointManager) -> None:
        """The checkpoint that was just saved is the best: `train.keep_last` spares it, and no longer the one before it.

        `best.json` in the folder of the run says which it is. Every rank calls it.
        """
        checkpoints.wait()
        if self._state.rank == 0:
            checkpoints.protect(self._best["step"])
            if self._replaced not in (None, self._best["step"]):
                checkpoints.release(self._replaced)
            write_json(checkpoints.folder.parent / BEST, self._best)
        barrier()

    def state_dict(self) -> dict[str, Any]:
        """The best so far, for a checkpoint."""
        return dict(self._best)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; another figure than before has no best yet."""
        self._best = dict(state) if self._train.best_metric in state else {}


@torch.no_grad()
def held_out_loss(
    model: nn.Module, loader: Any, state: ParallelState, pad_token_id: int, arguments: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """The mean `loss` over all `targets` of a loader's data, and how many these are. Every rank calls it.

    Args:
        model: wrapped; it is evaluated without dropout, and trains as before afterwards.
        loader: of whole epochs (`drop_last=False`).
        state, pad_token_id: of the run.
        arguments: what the model is called with besides a batch.
    """
    total = torch.zeros((), dtype=torch.float64, device=state.device)
    targets = 0
    loader.set_epoch(0)
    with evaluated(model):
        for micro_batches in loader:
            targets += count_targets(micro_batches)
            for batch in micro_batches:
                batch = slice_for_sequence_parallel(
                    to_device(batch, state.device),
                    state.sp.get_local_rank(),
                    state.sp.size(),
                    pad_token_id=pad_token_id,
                )
                total += model(**batch, num_items_in_batch=1, use_cache=False, **arguments).loss.double()
    targets = global_sum(targets, state.dp)
    return {"loss": global_sum(total, state.loss).item() / max(1, targets), "targets": targets}
