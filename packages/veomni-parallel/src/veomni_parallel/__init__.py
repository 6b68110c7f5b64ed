"""Meshes, wrappers and sequence parallelism for any PyTorch model, with the mathematics unchanged."""

from __future__ import annotations

from veomni_parallel.activation_checkpointing import SelectiveCheckpointing
from veomni_parallel.activation_offload import OffloadReport, activation_offload
from veomni_parallel.balance import Exchange, balance_over_ranks, deal_samples, fit_costs
from veomni_parallel.errors import ParallelError
from veomni_parallel.expert_parallel import (
    ExchangePlan,
    apply_expert_parallel,
    balance_experts_,
    plan_exchange,
    tokens_per_expert,
)
from veomni_parallel.gradient_norm import clip_grad_norm_
from veomni_parallel.gradient_sync import gradient_sync
from veomni_parallel.leak_probe import Leak, LeakReport, leak_probe
from veomni_parallel.loss_scale import count_targets, global_sum, loss_scale
from veomni_parallel.mesh import ParallelSizes, ParallelState, init_parallel_state, resolve_sizes
from veomni_parallel.mixed_precision import MixedPrecision
from veomni_parallel.packed_attention import MaskRule, packed_attention
from veomni_parallel.parallelize import build_parallelize_model
from veomni_parallel.plan import ParallelPlan
from veomni_parallel.replica_checks import Difference, NonFinite, find_nonfinite, sync_check
from veomni_parallel.router_loss import router_loss
from veomni_parallel.seeding import seed_ranks
from veomni_parallel.tensor_parallel import apply_tensor_parallel
from veomni_parallel.tower_sharing import evaluated, share_towers
from veomni_parallel.ulysses import ulysses_attention
from veomni_parallel.ulysses_diffusers import apply_ulysses_diffusers
from veomni_parallel.ulysses_transformers import apply_packed_attention, apply_ulysses, plain_attention
from veomni_parallel.vocabulary_parallel import vocabulary_parallel_cross_entropy
from veomni_parallel.watchdog import Watchdog

__all__ = [
    "Difference",
    "Exchange",
    "ExchangePlan",
    "Leak",
    "LeakReport",
    "MaskRule",
    "MixedPrecision",
    "NonFinite",
    "OffloadReport",
    "ParallelError",
    "ParallelPlan",
    "ParallelSizes",
    "ParallelState",
    "SelectiveCheckpointing",
    "Watchdog",
    "activation_offload",
    "apply_expert_parallel",
    "apply_packed_attention",
    "apply_tensor_parallel",
    "apply_ulysses",
    "apply_ulysses_diffusers",
    "balance_experts_",
    "balance_over_ranks",
    "build_parallelize_model",
    "clip_grad_norm_",
    "count_targets",
    "deal_samples",
    "evaluated",
    "find_nonfinite",
    "fit_costs",
    "global_sum",
    "gradient_sync",
    "init_parallel_state",
    "leak_probe",
    "loss_scale",
    "packed_attention",
    "plain_attention",
    "plan_exchange",
    "resolve_sizes",
    "router_loss",
    "seed_ranks",
    "share_towers",
    "sync_check",
    "tokens_per_expert",
    "ulysses_attention",
    "vocabulary_parallel_cross_entropy",
]
