"""How a configuration spreads a model over ranks, in the words of veomni-parallel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from veomni_config import BatchPlan, TrainConfig
from veomni_parallel import ParallelState, activation_offload, init_parallel_state, seed_ranks


def parallel_state(train: TrainConfig, plan: BatchPlan, device: torch.device) -> ParallelState:
    """The meshes of the run, with the random generators of each rank seeded for dropout.

    Weights and data have generators of their own.
    """
    sizes = train.parallel_sizes() | {"dp_replicate": plan.dp_replicate, "dp_shard": plan.dp_shard}
    state = init_parallel_state(**sizes, device_type=device.type, ep_outside=train.ep_outside)
    seed_ranks(train.seed, state)
    return state


def wrapping(train: TrainConfig) -> dict[str, Any]:
    """The options of `build_parallelize_model` that the configuration holds."""
    return {
        "mode": train.data_parallel_mode,
        "mixed_precision": "bf16" if train.enable_mixed_precision else None,
        "reshard_after_forward": train.enable_full_shard,
        "activation_checkpointing": "full" if train.enable_gradient_checkpointing else None,
        "cpu_offload": train.enable_fsdp_offload,
        "compile": train.enable_compile,
        "forward_prefetch": train.enable_forward_prefetch,
        "overlap_ulysses": train.async_enabled,
    }


def offloading(train: TrainConfig) -> AbstractContextManager[Any]:
    """Around forward and backward: activations wait in host memory, if the configuration says so."""
    return activation_offload(train.activation_gpu_limit) if train.enable_activation_offload else nullcontext()
