"""When memory is tidied up: on all ranks in the same step, so that none waits for another's garbage."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from veomni_config import TrainConfig


@contextmanager
def tidied_together(train: TrainConfig) -> Iterator[Callable[[int], None]]:
    """Inside, Python collects garbage every `train.gc_steps` steps and not by itself (0 leaves it to Python).

    Call what it gives with the number of each step; a device's cache is emptied every `train.empty_cache_steps`.
    """
    by_itself = gc.isenabled()
    if train.gc_steps:
        gc.collect()
        gc.disable()

    def tidy(step: int) -> None:
        if train.gc_steps and step % train.gc_steps == 0:
            gc.collect()
        if train.empty_cache_steps and step % train.empty_cache_steps == 0 and torch.accelerator.is_available():
            torch.get_device_module().empty_cache()

    try:
        yield tidy
    finally:
        if by_itself:
            gc.enable()
