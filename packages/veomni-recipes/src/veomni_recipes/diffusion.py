"""What a diffusion transformer learns: noise that is added to latents, and what is to be predicted of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """What is random about the samples of a batch.

    Attributes:
        noise: [B, *shape], of variance 1, float32.
        time: [B] in 0 .. 1, float32: 0 is the picture, 1 is noise, before any shift.
        dropped: bool [B], the samples that are learnt without their conditions.
    """

    noise: Tensor
    time: Tensor
    dropped: Tensor


def draw(
    ids: Sequence[int],
    shape: Sequence[int],
    *,
    seed: int,
    step: int,
    sampling: Literal["uniform", "logit_normal"] = "logit_normal",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    condition_dropout: float = 0.0,
) -> Draws:
    """Draw noise and times of samples, on the CPU, as functions of the seed, the step and each sample's id alone.

    So neither the number of ranks nor the samples beside it change what a sample learns from.

    Args:
        ids: of the samples.
        shape: of a sample's latents.
        seed, step: of the run.
        sampling: "uniform" times, or "logit_normal": sigmoid(logit_mean + logit_std * n) of a normal n
            (https://arxiv.org/abs/2403.03206, section 3.1).
        logit_mean, logit_std: of the latter.
        condition_dropout: share of samples without conditions (https://arxiv.org/abs/2207.12598).
    """
    noise, time = torch.empty(len(ids), *shape), torch.empty(len(ids))
    dropped = torch.empty(len(ids), dtype=torch.bool)
    for i, sample in enumerate(ids):
        own = hashlib.blake2b(f"{seed} {step} {sample}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(own, "big") >> 1)
        dropped[i] = torch.rand((), generator=generator) < condition_dropout
        if sampling == "uniform":
            time[i] = torch.rand((), generator=generator)
        else:
            time[i] = (logit_mean + logit_std * torch.randn((), generator=generator)).sigmoid()
        noise[i].normal_(generator=generator)
    return Draws(noise, time, dropped)


def add_noise(
    scheduler: Any, latents: Tensor, noise: Tensor, time: Tensor, shift: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents with noise, the timestep that a transformer is told, and what it is to predict, as the scheduler says.

    Flow matching (https://arxiv.org/abs/2210.02747, as in https://arxiv.org/abs/2403.03206, equations 13 and 23)::

        sigma = shift * time / (1 + (shift - 1) * time)
        noisy = (1 - sigma) * latents + sigma * noise          target = noise - latents

    Diffusion (https://arxiv.org/abs/2006.11239, equation 4; v: https://arxiv.org/abs/2202.00512, appendix D), with the
    scheduler's products a of 1 - beta::

        noisy = sqrt(a) * latents + sqrt(1 - a) * noise        target = noise                                (epsilon)
                                                                      = sqrt(a) * noise - sqrt(1 - a) * latents    (v)
                                                                      = latents                              (sample)

    Timesteps are whole numbers, which no cast to bfloat16 on a sharded model's way in changes, and the noise is that of
    the whole number.

    Args:
        scheduler: of diffusers.
        latents, noise: [B, ...] float32.
        time: [B] in 0 .. 1.
        shift: of times towards noise; 1 without, which it is for diffusion.

    Returns:
        noisy [B, ...], timestep int64 [B] of `num_train_timesteps`, target [B, ...].
    """
    steps = int(scheduler.config.num_train_timesteps)
    column = (-1, *[1] * (latents.dim() - 1))
    if is_flow(scheduler):
        timestep = (shift * time / (1 + (shift - 1) * time) * steps).round().clamp(1, steps).long()
        sigma = (timestep.float() / steps).view(column)
        return (1 - sigma) * latents + sigma * noise, timestep, noise - latents
    timestep = (time * steps).long().clamp(max=steps - 1)
    kept = scheduler.alphas_cumprod.to(latents.device, torch.float32, non_blocking=True)[timestep].view(column)
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    target = {
        "epsilon": noise,
        "v_prediction": signal * noise - spread * latents,
        "sample": latents,
    }[scheduler.config.prediction_type]
    return signal * latents + spread * noise, timestep, target


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler's transformer predicts the velocity of a straight path from picture to noise."""
    flows = type(scheduler).__name__.startswith("FlowMatch")
    return flows or scheduler.config.get("prediction_type") == "flow_prediction"


def noise_shift(scheduler: Any, tokens: int) -> float:
    """The shift of times with which a scheduler was made, for pictures of so many latent tokens.

    Schedulers whose shift follows the size have `mu` in a straight line of the tokens, and the shift is exp(mu) (or mu,
    for `time_shift_type: linear`).
    """
    config = scheduler.config
    if not is_flow(scheduler):
        return 1.0
    if config.get("use_dynamic_shifting"):
        mu = shift_exponent(config, tokens)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return float(config.get("shift") or config.get("flow_shift") or 1.0)


def shift_exponent(config: Mapping[str, Any], tokens: int) -> float:
    """`mu` of a scheduler whose shift follows the size, for pictures of so many latent tokens."""
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    return float(low + (high - low) * (tokens - first) / (last - first))


def drop_conditions(
    conditions: Mapping[str, Tensor], unconditional: Mapping[str, Tensor], dropped: Tensor
) -> dict[str, Tensor]:
    """Conditions [B, ...] with those of no wish at all, [...], in place of the dropped ones (bool [B], on the CPU)."""
    if not dropped.any():
        return dict(conditions)
    return {
        name: torch.where(
            dropped.to(value.device, non_blocking=True).view(-1, *[1] * (value.dim() - 1)),
            unconditional[name].to(value),
            value,
        )
        for name, value in conditions.items()
    }
