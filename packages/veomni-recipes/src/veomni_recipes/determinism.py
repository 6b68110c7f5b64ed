"""A run that repeats bit by bit."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from veomni_config import TrainConfig


def make_deterministic(train: TrainConfig) -> None:
    """With `train.enable_full_determinism`, let torch use deterministic kernels only; before any work on a device.

    An operation that has none raises, naming itself. What libraries draw from Python's and numpy's generators is seeded
    too; torch's are seeded for each rank when its place among the others is known.
    """
    if not train.enable_full_determinism:
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not deterministic, and torch refuses it
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # which transformers hands on to the kernel
    os.environ["NCCL_ALGO"] = "Ring"  # sums of ranks in the same order, whatever NCCL has tuned
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    random.seed(train.seed)
    np.random.seed(train.seed)
