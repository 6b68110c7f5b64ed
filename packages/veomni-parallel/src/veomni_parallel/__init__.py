"""Meshes, wrappers and sequence parallelism for any PyTorch model, with the mathematics unchanged."""

from __future__ import annotations

from veomni_parallel.errors import ParallelError
from veomni_parallel.gradient_norm import clip_grad_norm_
from veomni_parallel.gradient_sync import gradient_sync
from veomni_parallel.loss_scale import count_targets, global_sum, loss_scale
from veomni_parallel.mesh import ParallelSizes, ParallelState, init_parallel_state, resolve_sizes
from veomni_parallel.mixed_precision import MixedPrecision
from veomni_parallel.parallelize import build_parallelize_model
from veomni_parallel.plan import ParallelPlan
from veomni_parallel.ulysses import ulysses_attention
from veomni_parallel.ulysses_transformers import apply_ulysses, plain_attention

__all__ = [
    "MixedPrecision",
    "ParallelError",
    "ParallelPlan",
    "ParallelSizes",
    "ParallelState",
    "apply_ulysses",
    "build_parallelize_model",
    "clip_grad_norm_",
    "count_targets",
    "global_sum",
    "gradient_sync",
    "init_parallel_state",
    "loss_scale",
    "plain_attention",
    "resolve_sizes",
    "ulysses_attention",
]
