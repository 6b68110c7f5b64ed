"""Steps that must not be applied: a loss or a gradient that is not finite, or far beyond those before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from veomni_config import TrainConfig

from veomni_recipes.black_box import BlackBox
from veomni_recipes.distributed import rank
from veomni_recipes.errors import TrainingError


class Guard:
    """Decides on each step before it is applied, on all ranks alike, as `train.bad_step` says.

        if guard.allows(step, loss, grad_norm):
            optimizer.step()

    To decide, the host reads two numbers of the device once a step; with `ignore` it reads nothing.

    A step is bad if its loss or gradient norm is not finite or, with `train.spike_sigma`, more than so many standard
    deviations above the mean of the last `train.spike_window` good steps, once there are half as many.

    Args:
        train: of the configuration.
        black_box: writes a bad step down, with the weights of the first of several.
    """

    def __init__(self, train: TrainConfig, black_box: BlackBox) -> None:
        self._train, self._black_box = train, black_box
        self._good: dict[str, deque[float]] = {
            name: deque(maxlen=train.spike_window) for name in ("loss", "gradient norm")
        }
        self._bad_in_a_row = 0

    def allows(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the step is to be applied. Every rank calls it and gets the same answer.

        Args:
            step: of the run.
            loss, grad_norm: of the whole step, scalars that are the same on all ranks.

        Raises:
            TrainingError: it is bad, and the run is to stop; or it is one bad step too many.
        """
        if self._train.bad_step == "ignore":
            return True
        values = torch.stack([loss.detach().double(), grad_norm.detach().double()]).tolist()
        named = dict(zip(self._good, values, strict=True))
        reason = self._judge(named)
        if reason is None:
            self._bad_in_a_row = 0
            for name, value in named.items():
                self._good[name].append(value)
            return True

        self._bad_in_a_row += 1
        folder = self._black_box.write(reason, loss=values[0], grad_norm=values[1])
        if self._bad_in_a_row == 1:  # those that follow have the same weights
            self._black_box.write_weights()
        where = f"{folder} says what was in it, `veomni replay {folder.parents[1]} --step {step}` runs it again"
        if self._train.bad_step == "stop":
            raise TrainingError(f"step {step} is not applied and the run ends: {reason}; {where}")
        if self._bad_in_a_row >= self._train.max_bad_steps:
            raise TrainingError(
                f"step {step} is the {self._bad_in_a_row}th bad one in a row (train.max_bad_steps) and the run ends: "
                f"{reason}; {where}"
            )
        if rank() == 0:
            print(f"step {step} is skipped: {reason}; {where}", flush=True)
        return False

    def _judge(self, named: Mapping[str, float]) -> str | None:
        for name, value in named.items():
            if not math.isfinite(value):
                return f"its {name} is {value}"
        for name, value in named.items():
            before, sigma = self._good[name], self._train.spike_sigma
            if sigma is None or len(before) < self._train.spike_window // 2:
                continue
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if value > mean + sigma * deviation:
                return (
                    f"its {name} of {value:.4g} is a spike, above {mean:.4g} + {sigma:g} x {deviation:.2g} of the last "
                    f"{len(before)} good steps (train.spike_sigma)"
                )
        return None

    def state_dict(self) -> dict[str, Any]:
        """What it judges by, for a checkpoint."""
        return {"good": {name: list(values) for name, values in self._good.items()}, "bad": self._bad_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name, values in state["good"].items():
            self._good[name].clear()
            self._good[name].extend(values)
        self._bad_in_a_row = state["bad"]
