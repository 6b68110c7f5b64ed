"""What a diffusion transformer learns to do, and how good it is at it: in training, on held-out data, in a replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from veomni_config import ConfigError, DitRecipeConfig, DitTrainConfig, Problem
from veomni_data import Sample
from veomni_parallel import ParallelState, evaluated, global_sum

from veomni_recipes.batch_counts import count_targets
from veomni_recipes.diffusion import Draws, add_noise, draw, drop_conditions, noise_shift
from veomni_recipes.diffusion_data import conditions_of, stack_samples
from veomni_recipes.distributed import to_device

HELD_OUT_TIMES = (0.125, 0.375, 0.625, 0.875)
"""Times between picture and noise, before the shift, at which every held-out sample is looked at; evenly spaced, as for
the validation losses of https://arxiv.org/abs/2403.03206."""


@dataclass(frozen=True)
class Denoising:
    """Latents get noise, and what the transformer predicts of them is held against what it should be.

    Attributes:
        predict: (noisy [B, ...], timestep [B], conditions, guidance) -> prediction [B, ...].
        scheduler: of diffusers, which says what is predicted.
        unconditional: conditions of no prompt, [...] each, on the device.
        guidance: that a guidance-distilled transformer is told.
        train: of the configuration, which says how times are drawn.
    """

    predict: Callable[[Tensor, Tensor, Mapping[str, Tensor], float], Tensor]
    scheduler: Any
    unconditional: Mapping[str, Tensor]
    guidance: float
    train: DitTrainConfig

    def draws(self, batch: Mapping[str, Any], step: int) -> Draws:
        """What is random about a batch in a step, on the CPU; of each sample it depends on seed, step and id alone."""
        return draw(
            batch["ids"],
            batch["latents"].shape[1:],
            seed=self.train.seed,
            step=step,
            sampling=self.train.timestep_sampling,
            logit_mean=self.train.logit_mean,
            logit_std=self.train.logit_std,
            condition_dropout=self.train.condition_dropout,
        )

    def loss(self, batch: Mapping[str, Any], step: int) -> Tensor:
        """The sum over all numbers of the latents of the squared error, with the noise and the times of a step.

        Args:
            batch: of `stack_samples`, on the device.
            step: of the run.
        """
        drawn = self.draws(batch, step)
        conditions = drop_conditions(conditions_of(batch), self.unconditional, drawn.dropped)
        return self._squares(batch, drawn.noise, drawn.time, conditions)

    def held_out_losses(self, batch: Mapping[str, Any]) -> Tensor:
        """The same sum at each of `HELD_OUT_TIMES`, with the prompts and with noise that no step of training has."""
        noise = self.draws(batch, step=0).noise
        times = (torch.full((len(noise),), time) for time in HELD_OUT_TIMES)
        return torch.stack([self._squares(batch, noise, time, conditions_of(batch)) for time in times])

    def _squares(
        self, batch: Mapping[str, Any], noise: Tensor, time: Tensor, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        latents = batch["latents"].float()
        noise, time = (drawn.to(latents.device, non_blocking=True) for drawn in (noise, time))
        shift = self.train.timestep_shift or noise_shift(self.scheduler, batch["tokens"] // len(batch["ids"]))
        noisy, timestep, target = add_noise(self.scheduler, latents, noise, time, shift)
        predicted = self.predict(noisy, timestep, conditions, self.guidance)
        return F.mse_loss(predicted.float(), target, reduction="sum")


@torch.no_grad()
def measure_held_out(denoising: Denoising, model: nn.Module, state: ParallelState, loader: Any) -> dict[str, Any]:
    """The mean square of held-out latents, over `HELD_OUT_TIMES` and at each of them. Every rank calls it.

    Args:
        denoising: by `model`, which is wrapped; it is evaluated without dropout, and trains as before afterwards.
        state: of the run.
        loader: of whole epochs (`drop_last=False`).
    """
    totals = torch.zeros(len(HELD_OUT_TIMES), dtype=torch.float64, device=state.device)
    company = stack_samples([loader.dataset[0]])  # for a rank without samples, as all call a sharded model together
    targets = 0
    loader.set_epoch(0)
    with evaluated(model):
        for micro_batches in loader:
            for batch in micro_batches:
                losses = denoising.held_out_losses(to_device(batch or company, state.device))
                if batch:
                    totals += losses.double()
                    targets += count_targets([batch])
    targets = global_sum(targets, state.dp)
    means = (global_sum(totals, state.dp) / max(1, targets)).tolist()
    by_time = {f"time {time:g}": mean for time, mean in zip(HELD_OUT_TIMES, means, strict=True)}
    return {"loss": sum(means) / len(means), "targets": targets, "losses": by_time}


def refuse_prompts_alone(cfg: DitRecipeConfig, first: Sample) -> None:
    """Raise ConfigError if held-out data are to be validated on, but the first of them has no latents."""
    if "latents" in first or not (cfg.train.eval_steps or cfg.train.eval_epochs):
        return
    text = (
        f"{cfg.data.eval_path} holds prompts alone, which are drawn but cannot be validated on: let prepare_dit encode "
        "lines with pictures or videos into it, or set train.eval_steps and train.eval_epochs to 0"
    )
    raise ConfigError([Problem("data.eval_path", text)])
