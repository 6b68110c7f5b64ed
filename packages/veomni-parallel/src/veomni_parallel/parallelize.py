"""One call that turns a model into a model of many ranks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp import MixedPrecision as Fsdp1MixedPrecision
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from veomni_parallel.activation_checkpointing import (
    Checkpointing,
    SelectiveCheckpointing,
    checkpoint_activations,
    resolve_checkpointing,
)
from veomni_parallel.errors import ParallelError
from veomni_parallel.expert_adapters import adapters_around
from veomni_parallel.expert_parallel import apply_expert_parallel, expert_modules
from veomni_parallel.mesh import LocalMesh, Mesh, ParallelState
from veomni_parallel.mixed_precision import (
    MixedPrecision,
    autocast_forward,
    cast_output,
    compute_in_float32,
    resolve_mixed_precision,
)
from veomni_parallel.plan import (
    ParallelPlan,
    find_frozen_units,
    find_named,
    find_shard_units,
    find_whole_modules,
    outermost,
)
from veomni_parallel.router_loss import use_global_router_loss
from veomni_parallel.tensor_parallel import apply_tensor_parallel
from veomni_parallel.tower_sharing import keep_towers_in_step, share_towers
from veomni_parallel.ulysses import require_ulysses
from veomni_parallel.ulysses_diffusers import apply_ulysses_diffusers, is_diffusers_model
from veomni_parallel.ulysses_transformers import apply_packed_attention, apply_ulysses

_CALLED_BY = ("encode", "decode")
"""Methods by which autoencoders are called instead of by their forward."""


@dataclass(frozen=True)
class _Cut:
    """What is wrapped, inner modules of each kind before the outer ones that contain them."""

    units: dict[str, nn.Module]
    frozen: dict[str, nn.Module]
    """Parts without trainable parameters, outside of units."""
    whole: dict[str, nn.Module]
    """Parts that every rank keeps whole."""
    float32: dict[str, nn.Module]
    experts: dict[str, nn.Module]
    beside_experts: list[nn.Module] = field(default_factory=list)
    """Modules inside experts modules, which are used by all ranks for whatever tokens arrive."""


def build_parallelize_model(
    model: nn.Module,
    state: ParallelState,
    *,
    mode: Literal["fsdp2", "fsdp1", "ddp"] = "fsdp2",
    plan: ParallelPlan | None = None,
    mixed_precision: Literal["bf16"] | MixedPrecision | None = None,
    reshard_after_forward: bool = True,
    activation_checkpointing: Checkpointing | None = None,
    cpu_offload: bool = False,
    compile: bool | Mapping[str, Any] = False,
    forward_prefetch: bool = True,
    overlap_ulysses: bool = False,
) -> nn.Module:
    """Spread any `nn.Module` over the ranks of `state`. Freeze parameters before, build the optimizer after.

    All ranks must hold the same weights, or the model is on the meta device (fsdp2 only): then give it storage with
    `to_empty` and load weights afterwards. Frozen parameters may lie beside trainable ones; parts that are frozen as a
    whole become units of their own. Gradients are averaged over all ranks of `state.loss`, which `loss_scale` undoes.
    Without a process group, the model itself is returned, on `state.device` like in every mode unless it is on meta.

    What the sizes of `state` ask for is applied first: matrices are divided over `state.tp` (`apply_tensor_parallel`),
    experts are dealt over `state.ep` (`apply_expert_parallel`), and with `state.sp.size() > 1` a transformers model is
    switched to Ulysses attention by `apply_ulysses`, one of diffusers by `apply_ulysses_diffusers`; any other model
    must call `ulysses_attention` itself, which its first training step checks.

    Args:
        model: on the CPU, the rank's device, or meta; a transformers model or any other.
        state: from `init_parallel_state`.
        mode: "fsdp2" (`fully_shard`, in place; HSDP if there are replicas), "fsdp1" (original parameters kept), "ddp".
            tp and ep need "fsdp2".
        plan: units of sharding and recomputation, experts, divided matrices; None: found from the model.
        mixed_precision: None, "bf16" (computed in bfloat16, reduced in float32) or a `MixedPrecision`.
        reshard_after_forward: free a unit's gathered parameters after its forward (less memory, one more gathering):
            shards of parameters, gradients and optimizer (ZeRO-3); False: of gradients and optimizer (ZeRO-2).
        activation_checkpointing: what units recompute in backward: "full" all, n every n-th unit, "selective" all but
            matrix products and attention, or a `SelectiveCheckpointing` that names operators.
        cpu_offload: keep shards, gradients and optimizer in host memory (fsdp2, fsdp1).
        compile: `torch.compile` the forward of every unit; a mapping holds its arguments ({"backend": ...}). The
            exchange of experts stays outside of the graphs.
        forward_prefetch: gather the next unit's parameters while this one computes.
        overlap_ulysses: the exchange between Ulysses ranks overlaps with the projections of attention, see
            `apply_ulysses`.

    Raises:
        ParallelError: an unknown option, a model on meta for ddp or fsdp1, a model that is wrapped already, a state of
            another process group, a plan that names what the model does not have, or heads, experts or matrices that
            the sizes do not divide.
    """
    precision, recompute = resolve_mixed_precision(mixed_precision), resolve_checkpointing(activation_checkpointing)
    plan = plan or ParallelPlan()
    if compile is not False and isinstance(recompute, SelectiveCheckpointing):
        raise ParallelError(
            "A compiled block is a graph of its own operators, of which selective checkpointing cannot keep some: use"
            ' activation_checkpointing="full", a number, or compile=False.'
        )
    _check(model, state, mode, plan, cpu_offload)

    units, whole = find_shard_units(model, plan), find_whole_modules(model, plan)
    _check_heads(model, state)
    if state.ep.size() > 1:
        apply_expert_parallel(model, state, plan.experts)
    experts = {name: module for name, module in expert_modules(model).items() if state.ep.size() > 1}
    if state.tp.size() > 1:
        apply_tensor_parallel(model, state, plan.tp, exclude=tuple(experts))
    if hasattr(model, "get_decoder"):
        if state.sp.size() > 1:
            apply_ulysses(model, state.sp, overlap=overlap_ulysses)
        else:
            apply_packed_attention(model)
        share_towers(model, state.sp)
    elif state.sp.size() > 1 and is_diffusers_model(model):
        apply_ulysses_diffusers(model, state)
    elif state.sp.size() > 1:
        require_ulysses(model)
    use_global_router_loss(model, state)

    islands: dict[str, nn.Module] = {}
    if precision is not None:
        islands = outermost(find_named(model, precision.float32, "MixedPrecision.float32"))
        for island in islands.values():
            compute_in_float32(island, precision, state.device_type)
    _recompute_and_compile(model, units, experts, recompute, compile)
    if precision is not None and (mode == "ddp" or isinstance(state.fsdp, LocalMesh)):
        autocast_forward(model, precision.param_dtype, state.device_type)
    if precision is not None and precision.output_dtype is not None:
        cast_output(model, precision.output_dtype)

    if isinstance(state.fsdp, LocalMesh):
        return model if any(p.is_meta for p in model.parameters()) else model.to(state.device)
    if mode == "ddp":
        return _ddp(model, state)
    frozen = find_frozen_units(model, units)
    cut = _Cut(
        units=_outside(units, whole | islands),
        frozen=_outside(frozen, whole | islands),
        whole=whole,
        float32=_outside(islands, whole),
        experts=experts,
        beside_experts=[
            child for module in experts.values() for child in module.children() if any(True for _ in child.parameters())
        ],
    )
    if mode == "fsdp1":
        model = _fsdp1(model, state, cut, precision, reshard_after_forward, cpu_offload, forward_prefetch)
    else:
        model = _fsdp2(model, state, cut, precision, reshard_after_forward, cpu_offload, forward_prefetch)
    if hasattr(model, "get_decoder"):
        keep_towers_in_step(model, state.loss)
    return model


def _check(model: nn.Module, state: ParallelState, mode: str, plan: ParallelPlan, cpu_offload: bool) -> None:
    if mode not in ("fsdp2", "fsdp1", "ddp"):
        raise ParallelError(f'mode={mode!r} is none of "fsdp2", "fsdp1" and "ddp".')
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule | FullyShardedDataParallel | DistributedDataParallel):
            where = f"{name} in it" if name else "The model"
            raise ParallelError(f"{where} is wrapped already ({type(module).__name__}); hand over the plain module.")
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size != state.sizes.world_size:
        raise ParallelError(
            f"The state was built for {state.sizes.world_size} ranks, but there are {world_size}: call"
            " init_parallel_state in this process group."
        )
    if mode != "fsdp2" and (on_meta := [name for name, p in model.named_parameters() if p.is_meta]):
        raise ParallelError(
            f'mode="{mode}" needs a model with weights, but {len(on_meta)} parameters are on the meta device (the first'
            f' is {on_meta[0]}): build it on a real device, or use mode="fsdp2".'
        )
    if mode == "fsdp1" and plan.no_shard:
        raise ParallelError('ParallelPlan.no_shard is for mode="fsdp2"; mode="fsdp1" shards every parameter.')
    if mode != "fsdp2" and (state.tp.size() > 1 or state.ep.size() > 1):
        sizes = f"tp={state.tp.size()} and ep={state.ep.size()}"
        raise ParallelError(
            f'{sizes} need mode="fsdp2", not "{mode}" (with dp_shard=1 and replicas it does what DDP does).'
        )
    if mode == "ddp" and cpu_offload:
        raise ParallelError('cpu_offload is for mode="fsdp2" and "fsdp1"; DDP keeps every parameter on the device.')
    if plan.experts is not None and state.ep.size() == 1:
        find_named(model, plan.experts, "ParallelPlan.experts")


def _check_heads(model: nn.Module, state: ParallelState) -> None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, tp, sp = getattr(text, "num_attention_heads", None), state.tp.size(), state.sp.size()
    if tp > 1 and sp > 1 and isinstance(heads, int) and heads % (tp * sp):
        raise ParallelError(
            f"{heads} attention heads (num_attention_heads of {type(model).__name__}) cannot be divided over tp={tp} x"
            f" ulysses={sp} = {tp * sp} ranks."
        )


def _recompute_and_compile(
    model: nn.Module,
    units: Mapping[str, nn.Module],
    experts: Mapping[str, nn.Module],
    recompute: Checkpointing | None,
    compile: bool | Mapping[str, Any],
) -> None:
    compiled, options = compile is not False, compile if isinstance(compile, Mapping) else {}
    if compiled:
        _leave_eager(model, experts)
    for index, unit in enumerate(units.values()):
        if compiled:
            # inside of the recomputation: a block may break into several graphs, which a recomputed region may not
            unit.forward = torch.compile(unit.forward, **options)
        if isinstance(recompute, SelectiveCheckpointing):
            checkpoint_activations(unit, recompute)
        elif recompute == "full" or (isinstance(recompute, int) and index % recompute == 0):
            checkpoint_activations(unit)


def _leave_eager(model: nn.Module, experts: Mapping[str, nn.Module]) -> None:
    """End graphs where numbers of tokens are read on the host: at experts' exchanges and packed rows' attention."""
    for module in experts.values():
        for outer in (*adapters_around(model, module), module):
            outer.forward = torch.compiler.disable(outer.forward)
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    names = {str(getattr(config, "_attn_implementation", None)) for config in configs}
    if packed := [name for name in names if name.startswith("packed_")]:
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        for name in packed:
            function = ALL_ATTENTION_FUNCTIONS[name]
            AttentionInterface.register(name, torch.compiler.disable(inspect.unwrap(function)))


def _outside(modules: Mapping[str, nn.Module], outer: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {n: m for n, m in modules.items() if not any(n == o or n.startswith(o + ".") for o in outer)}


def _ddp(model: nn.Module, state: ParallelState) -> nn.Module:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model.to(state.device)  # DDP refuses a model in which nothing learns, such as a teacher
    # Buffers of a transformer are constants; broadcasting them would make every forward a collective.
    # torch 2.14 renamed the argument.
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    # weights in few bits cannot be broadcast; all ranks hold the same by contract
    plain = all(type(parameter) in (nn.Parameter, torch.Tensor) for parameter in model.parameters())
    return DistributedDataParallel(
        model.to(state.device),
        process_group=state.loss.get_group(),
        gradient_as_bucket_view=True,
        init_sync=plain,
        # a tower's unused head, or a branch that only some ranks take, must not stop the reduction
        find_unused_parameters=True,
        **options,
    )


def _fsdp1(
    model: nn.Module,
    state: ParallelState,
    cut: _Cut,
    precision: MixedPrecision | None,
    reshard_after_forward: bool,
    cpu_offload: bool,
    forward_prefetch: bool,
) -> nn.Module:
    hybrid = state.sizes.dp_replicate > 1
    if reshard_after_forward:
        strategy = ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD
    else:
        strategy = ShardingStrategy._HYBRID_SHARD_ZERO2 if hybrid else ShardingStrategy.SHARD_GRAD_OP
    policy = None
    # FSDP1 gathers in forward only, so what is called by other methods stays with its surroundings
    frozen = [part for part in cut.frozen.values() if not any(hasattr(part, method) for method in _CALLED_BY)]
    wrapped: dict[int, bool | dict[str, Any]] = {id(module): True for module in (*cut.units.values(), *frozen)}
    if precision is not None:
        policy = Fsdp1MixedPrecision(param_dtype=precision.param_dtype, reduce_dtype=precision.reduce_dtype)
        kept = Fsdp1MixedPrecision(param_dtype=torch.float32, reduce_dtype=precision.reduce_dtype)
        wrapped |= {id(module): {"mixed_precision": kept} for module in cut.float32.values()}
    mesh: Any = state.fsdp
    if hybrid:
        # a mesh of its own: FSDP1 takes a view of a larger mesh for a sign of tensor parallelism
        sizes = (state.sizes.dp_replicate, state.fsdp.size())
        mesh = init_device_mesh(state.device_type, sizes, mesh_dim_names=("replicate", "shard"))
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        sharding_strategy=strategy,
        auto_wrap_policy=CustomPolicy(lambda module: wrapped.get(id(module), False)),
        mixed_precision=policy,
        # FSDP1 pins what it offloads, which a machine without an accelerator cannot; there all is in host memory
        cpu_offload=CPUOffload(offload_params=True) if cpu_offload and state.device_type != "cpu" else None,
        device_id=state.device,
        forward_prefetch=forward_prefetch,
        use_orig_params=True,
    )


def _fsdp2(
    model: nn.Module,
    state: ParallelState,
    cut: _Cut,
    precision: MixedPrecision | None,
    reshard_after_forward: bool,
    cpu_offload: bool,
    forward_prefetch: bool,
) -> nn.Module:
    options: dict[str, Any] = {}
    if precision is not None:
        options["mp_policy"] = MixedPrecisionPolicy(precision.param_dtype, precision.reduce_dtype)
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=state.device_type != "cpu")

    def shard(module: nn.Module, mesh: Mesh = state.shard_mesh, **more: Any) -> None:
        own = {"reshard_after_forward": reshard_after_forward, "shard_placement_fn": _placement_for(module, mesh)}
        fully_shard(module, mesh=mesh, **options | own | more)

    if cut.whole:
        # a shard dimension of size 1 under all ranks as replicas: never gathered, gradients still reduced
        replicas = init_device_mesh(state.device_type, (state.loss.size(), 1), mesh_dim_names=("replicate", "shard"))
        for module in cut.whole.values():
            shard(module, replicas, reshard_after_forward=False)
    for module in cut.float32.values():
        reduced = precision.reduce_dtype if precision else None
        shard(module, mp_policy=MixedPrecisionPolicy(torch.float32, reduced, cast_forward_inputs=False))
    for module in cut.beside_experts:
        shard(module)
    for module in cut.experts.values():
        shard(module, state.expert_shard_mesh)
    for unit in reversed(cut.units.values()):  # inner units before the outer ones that contain them
        shard(unit)
    for module in reversed(cut.frozen.values()):
        shard(module)
        for method in _CALLED_BY:
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
    # The root holds embeddings and head, tied or not, so that code may use their weights without calling them.
    # It is needed first in backward and so not freed after forward, unless no backward follows.
    shard(model, reshard_after_forward=False)
    model.register_forward_hook(_reshard_without_backward)
    if hasattr(model, "set_reduce_scatter_unused_params"):
        # a rank on which a parameter got no gradient reduces a zero for it, as the others expect
        model.set_reduce_scatter_unused_params(True)
    if forward_prefetch:
        for (name, unit), (next_name, following) in pairwise(cut.units.items()):
            # siblings run one after the other; between different lists the order is not known
            if name.rpartition(".")[0] == next_name.rpartition(".")[0]:
                inside = [m for n, m in cut.experts.items() if n.startswith(next_name + ".")]
                unit.set_modules_to_forward_prefetch([following, *inside])
    return model


def _placement_for(module: nn.Module, mesh: Mesh) -> Any:
    """Where FSDP cuts a parameter that is divided over other ranks already: in a dimension that is not divided.

    So no rank's part is a strided selection of rows, whose size torch handles only where all divisions are even.
    """
    ranks = mesh.size(-1) if isinstance(mesh, torch.distributed.DeviceMesh) and mesh.ndim > 1 else mesh.size()
    names, title = {id(parameter): name for name, parameter in module.named_parameters()}, type(module).__name__

    def placement(parameter: nn.Parameter) -> Shard | None:
        if not isinstance(parameter, DTensor):
            return None
        divided = {p.dim % parameter.ndim for p in parameter.placements if hasattr(p, "dim")}
        local = parameter.to_local().shape
        for dim in range(parameter.ndim):
            if dim not in divided and (dim == 0 or local[dim] % ranks == 0):  # FSDP pads in dimension 0 only
                return Shard(dim)
        raise ParallelError(
            f"{names[id(parameter)]} {list(parameter.shape)} of {title} cannot be sharded over {ranks} ranks: none of"
            " the dimensions that tp or ep leave whole is a multiple of it; choose other sizes."
        )

    return placement


def _reshard_without_backward(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled():
        model.reshard()
