"""One call that turns a model into a model of many ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp import MixedPrecision as Fsdp1MixedPrecision
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn.parallel import DistributedDataParallel

from veomni_parallel.activation_checkpointing import checkpoint_activations
from veomni_parallel.errors import ParallelError
from veomni_parallel.mesh import LocalMesh, ParallelState
from veomni_parallel.mixed_precision import MixedPrecision, autocast_forward, resolve_mixed_precision
from veomni_parallel.plan import ParallelPlan, find_shard_units, find_whole_modules
from veomni_parallel.ulysses import require_ulysses
from veomni_parallel.ulysses_transformers import apply_ulysses


def build_parallelize_model(
    model: nn.Module,
    state: ParallelState,
    *,
    mode: Literal["fsdp2", "fsdp1", "ddp"] = "fsdp2",
    plan: ParallelPlan | None = None,
    mixed_precision: Literal["bf16"] | MixedPrecision | None = None,
    reshard_after_forward: bool = True,
    activation_checkpointing: Literal["full"] | None = None,
    forward_prefetch: bool = True,
) -> nn.Module:
    """Spread any `nn.Module` over the ranks of `state`. Freeze parameters before, build the optimizer after.

    All ranks must hold the same weights, or the model is on the meta device (fsdp2 only): then give it storage with
    `to_empty` and load weights afterwards. Frozen parameters may lie beside trainable ones. Gradients are averaged over
    all ranks of `state.loss`, which `loss_scale` undoes. Without a process group, the model itself is returned, on
    `state.device` like in every mode unless it is on meta.

    With `state.sp.size() > 1`, a transformers model is switched to Ulysses attention by `apply_ulysses`; any other
    model must call `ulysses_attention` itself, which its first training step checks.

    Args:
        model: on the CPU, the rank's device, or meta; a transformers model or any other.
        state: from `init_parallel_state`.
        mode: "fsdp2" (`fully_shard`, in place; HSDP if there are replicas), "fsdp1" (original parameters kept), "ddp".
        plan: units of sharding and recomputation; None: found from the model, see `find_shard_units`.
        mixed_precision: None, "bf16" (computed in bfloat16, reduced in float32) or a `MixedPrecision`.
        reshard_after_forward: free a unit's gathered parameters after its forward (less memory, one more gathering).
        activation_checkpointing: "full" recomputes every unit in backward.
        forward_prefetch: gather the next unit's parameters while this one computes.

    Raises:
        ParallelError: an unknown option, a model on meta for ddp or fsdp1, a model that is wrapped already, a plan that
            names what the model does not have, or heads that Ulysses cannot divide.
    """
    if mode not in ("fsdp2", "fsdp1", "ddp"):
        raise ParallelError(f'mode={mode!r} is none of "fsdp2", "fsdp1" and "ddp".')
    if activation_checkpointing not in (None, "full"):
        raise ParallelError(f'activation_checkpointing={activation_checkpointing!r} is neither None nor "full".')
    if isinstance(model, FSDPModule | FullyShardedDataParallel | DistributedDataParallel):
        raise ParallelError(f"The model is wrapped already ({type(model).__name__}); hand over the plain module.")
    precision = resolve_mixed_precision(mixed_precision)
    plan = plan or ParallelPlan()
    if mode != "fsdp2" and (on_meta := [name for name, p in model.named_parameters() if p.is_meta]):
        raise ParallelError(
            f'mode="{mode}" needs a model with weights, but {len(on_meta)} parameters are on the meta device (the first'
            f' is {on_meta[0]}): build it on a real device, or use mode="fsdp2".'
        )
    if mode == "fsdp1" and plan.no_shard:
        raise ParallelError('ParallelPlan.no_shard is for mode="fsdp2"; mode="fsdp1" shards every parameter.')

    units, whole = find_shard_units(model, plan), find_whole_modules(model, plan)
    if state.sp.size() > 1:
        if hasattr(model, "get_decoder"):
            apply_ulysses(model, state.sp)
        else:
            require_ulysses(model)
    if activation_checkpointing == "full":
        for unit in units.values():
            checkpoint_activations(unit)

    if precision is not None and (mode == "ddp" or isinstance(state.fsdp, LocalMesh)):
        autocast_forward(model, precision.param_dtype, state.device_type)
    if isinstance(state.fsdp, LocalMesh):
        return model if any(p.is_meta for p in model.parameters()) else model.to(state.device)
    if mode == "ddp":
        return _ddp(model, state)
    if mode == "fsdp1":
        return _fsdp1(model, state, units.values(), precision, reshard_after_forward, forward_prefetch)
    return _fsdp2(model, state, units, whole, precision, reshard_after_forward, forward_prefetch)


def _ddp(model: nn.Module, state: ParallelState) -> nn.Module:
    # Buffers of a transformer are constants; broadcasting them would make every forward a collective.
    # torch 2.14 renamed the argument.
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(
        model.to(state.device),
        process_group=state.loss.get_group(),
        gradient_as_bucket_view=True,
        # a tower's unused head, or a branch that only some ranks take, must not stop the reduction
        find_unused_parameters=True,
        **options,
    )


def _fsdp1(
    model: nn.Module,
    state: ParallelState,
    units: Iterable[nn.Module],
    precision: MixedPrecision | None,
    reshard_after_forward: bool,
    forward_prefetch: bool,
) -> nn.Module:
    hybrid = state.sizes.dp_replicate > 1
    if reshard_after_forward:
        strategy = ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD
    else:
        strategy = ShardingStrategy._HYBRID_SHARD_ZERO2 if hybrid else ShardingStrategy.SHARD_GRAD_OP
    policy = None
    if precision is not None:
        policy = Fsdp1MixedPrecision(param_dtype=precision.param_dtype, reduce_dtype=precision.reduce_dtype)
    blocks = {id(unit) for unit in units}
    return FullyShardedDataParallel(
        model,
        device_mesh=state.fsdp,
        sharding_strategy=strategy,
        auto_wrap_policy=CustomPolicy(lambda module: id(module) in blocks),
        mixed_precision=policy,
        device_id=state.device,
        forward_prefetch=forward_prefetch,
        use_orig_params=True,
    )


def _fsdp2(
    model: nn.Module,
    state: ParallelState,
    units: dict[str, nn.Module],
    whole: dict[str, nn.Module],
    precision: MixedPrecision | None,
    reshard_after_forward: bool,
    forward_prefetch: bool,
) -> nn.Module:
    options: dict[str, Any] = {}
    if precision is not None:
        options["mp_policy"] = MixedPrecisionPolicy(precision.param_dtype, precision.reduce_dtype)
    if whole:
        # a shard dimension of size 1 under all ranks as replicas: never gathered, gradients still reduced
        mesh = init_device_mesh(state.device_type, (state.loss.size(), 1), mesh_dim_names=("replicate", "shard"))
        for module in whole.values():
            fully_shard(module, mesh=mesh, reshard_after_forward=False, **options)
        units = {n: m for n, m in units.items() if not any(n == w or n.startswith(w + ".") for w in whole)}
    for unit in reversed(units.values()):  # inner units before the outer ones that contain them
        fully_shard(unit, mesh=state.fsdp, reshard_after_forward=reshard_after_forward, **options)
    # The root holds embeddings and head, tied or not, so that code may use their weights without calling them.
    # It is needed first in backward and so not freed after forward, unless no backward follows.
    fully_shard(model, mesh=state.fsdp, reshard_after_forward=False, **options)
    model.register_forward_hook(_reshard_without_backward)
    if hasattr(model, "set_reduce_scatter_unused_params"):
        # a rank on which a parameter got no gradient reduces a zero for it, as the others expect
        model.set_reduce_scatter_unused_params(True)
    if forward_prefetch:
        for (name, unit), (next_name, following) in pairwise(units.items()):
            # siblings run one after the other; between different lists the order is not known
            if name.rpartition(".")[0] == next_name.rpartition(".")[0]:
                unit.set_modules_to_forward_prefetch([following])
    return model


def _reshard_without_backward(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled():
        model.reshard()
