"""Expert parallelism: each rank holds some experts of a mixture, and tokens travel to them and back.

For every layer a rank sorts its (token, expert) pairs by expert, sends each token to the rank that holds the expert,
computes the experts it holds on what it received, sends the results back, and weighs and sums them where the tokens
live. Both exchanges are uneven all-to-alls that gradients flow through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from veomni_parallel.collectives import exchange, join_parts, take_part
from veomni_parallel.errors import ParallelError
from veomni_parallel.expert_adapters import (
    adapted,
    adapters_around,
    check_adapters,
    hand_adapters_to_experts,
    is_adapter,
)
from veomni_parallel.local_parameters import local_parts, parameters_replaced, scale_gradient
from veomni_parallel.loss_scale import global_sum
from veomni_parallel.mesh import ParallelState
from veomni_parallel.plan import find_named

NAME = "expert_parallel"
"""Name of the experts implementation in transformers' registry, and of the attribute that links a module to it."""

_SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class ExchangePlan:
    """Who sends how many rows to whom in one layer."""

    send: list[int]
    """Rows for each rank of the group, [P]."""
    receive: list[int]
    """Rows from each rank of the group, [P]."""
    rows: torch.Tensor
    """int64 [P, E/P]: of the rows from each rank, how many are for each expert that this rank holds."""


PlanExchange = Callable[[torch.Tensor, Any], ExchangePlan]


@dataclass
class ExpertLink:
    """What an experts module knows of its peers; its attribute `expert_parallel`."""

    experts: int
    """Number of experts in all."""
    group: Any
    """The ranks that hold different experts; None if this rank holds all."""
    tp_group: Any
    """The ranks that hold the same tokens, of which each sends its part; None if there are no others."""
    gradient_factor: float
    """Turns the mean over the shards of experts that FSDP takes into the mean over all ranks with different tokens."""
    plan: PlanExchange
    inner: str | None
    """Name of the implementation that computes the experts; None for a module that transformers does not know."""
    counts: torch.Tensor
    """int64 [E]: this rank's tokens for each expert in all backward passes since they were taken."""
    first: int = 0
    """Index of the first expert that this rank holds."""
    adapters: list[Any] = field(default_factory=list)
    """Adapters of peft that are at work around the experts as long as these run."""


def plan_exchange(counts: torch.Tensor, group: Any) -> ExchangePlan:
    """The sizes of an exchange from the numbers of rows that this rank has for each expert: int64 [E].

    The only place where the host waits for the device; whoever plans without data replaces this function.
    """
    ours = counts.view(dist.get_world_size(group), -1)  # [P, E/P]
    theirs = torch.empty_like(ours)
    dist.all_to_all_single(theirs, ours, group=group)
    send, receive = torch.stack([ours.sum(1), theirs.sum(1)]).tolist()
    return ExchangePlan(send, receive, theirs)


def apply_expert_parallel(
    model: nn.Module,
    state: ParallelState,
    experts: Sequence[str] | None = None,
    *,
    plan: PlanExchange = plan_exchange,
) -> dict[str, nn.Module]:
    """Deal the experts of `model` over `state.ep`. Call it before sharding; `build_parallelize_model` does.

    Experts modules of transformers get a registered experts function, inside which the implementation that the model
    was configured with (grouped_mm, batched_mm, eager) runs on the rank's own experts; layouts with bias, transposed
    or interleaved, are that implementation's affair. Routers, shared experts and all else stay as they are.

    Any other module is named by `experts` and keeps this protocol: each of its own parameters has the experts in its
    first dimension, and `forward(hidden [T, H], index [T, K] int64, weights [T, K]) -> [T, H]` computes
    sum_k weights[t, k] * expert[index[t, k]](hidden[t]) for as many experts as its parameters (and, if it has it, its
    attribute `num_experts`) say. Or, as in Llama 4, `forward(hidden [E * T, H]) -> [E * T, H]` is handed each token
    once for each expert, as zeros (which give zeros) where the expert is not chosen: then only the others travel.

    Each rank keeps E / ep experts as DTensors sharded in dim 0 over `state.ep`. Gradients are scaled so that a mean
    over `state.expert_shard_mesh`, as FSDP takes it, is the mean over `state.loss` that all other parameters get.
    Adapters of peft on the experts' 3-D weights (`target_parameters`) stay whole parameters like those of other layers.
    With `state.ep` of size 1 nothing moves, and tokens are counted only.

    Args:
        model: with equal weights on all ranks, or on meta.
        state: from `init_parallel_state`.
        experts: globs of module names; None: all experts modules of transformers.
        plan: what decides the sizes of an exchange.

    Returns:
        The experts modules by name.

    Raises:
        ParallelError: no experts found, a glob matches nothing, `state.ep` does not divide the experts, a module does
            not keep the protocol, adapters of weights that are not 3-D or beside tp, or this was done already.
    """
    known = {name: module for name, module in model.named_modules() if _is_known(module)}
    dense = {name: module for name, module in model.named_modules() if _is_dense(module)}
    chosen = known | dense if experts is None else _named(model, experts)
    if not chosen:
        raise ParallelError(
            f"{type(model).__name__} has no experts module that transformers' ExpertsInterface knows: use ep=1, or name"
            ' modules that keep the protocol of apply_expert_parallel, ParallelPlan(experts=["*.experts"]).'
        )
    for name, module in chosen.items():
        if hasattr(module, NAME):
            raise ParallelError(f"The experts of {name} are dealt over ranks already; hand over the plain model.")
        _check(name, module, state.ep.size())
        if state.ep.size() > 1:
            check_adapters(name, adapters_around(model, module), state.ep.size(), state.tp.size())
    for name, module in (known | chosen).items():
        ranks = state.ep.size() if name in chosen else 1
        _link(module, state, ranks, plan, is_known=name in known)
        if ranks > 1:
            hand_adapters_to_experts(adapters_around(model, module), _link_of(module).adapters)
    if known:
        _register(model, known)
    return chosen


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `apply_expert_parallel` linked, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(_link_of(module), ExpertLink)}


def tokens_per_expert(model: nn.Module, state: ParallelState, *, reset: bool = True) -> dict[str, torch.Tensor]:
    """How many tokens each expert was given on all ranks, int64 [E] by the name of the experts module.

    Counts the (token, expert) pairs of all backward passes since counts were last reset (each of them once, also where
    activations are recomputed). A collective: call it on all ranks. Empty without experts.
    """
    modules = expert_modules(model)
    if not modules:
        return {}
    links = [_link_of(module) for module in modules.values()]
    total = global_sum(torch.cat([link.counts.to(state.device) for link in links]), state.loss)
    if any(link.tp_group is not None for link in links):
        total = global_sum(total, state.tp)
    if reset:
        for link in links:
            link.counts = torch.zeros_like(link.counts)
    return dict(zip(modules, total.split([link.experts for link in links]), strict=True))


@torch.no_grad()
def balance_experts_(model: nn.Module, state: ParallelState, rate: float = 1e-3) -> dict[str, torch.Tensor]:
    """Move the routers' selection biases against the load of the step: call it after `optimizer.step()`.

    bias += rate * sign(mean load - load), which changes who is chosen but not how the chosen are weighted, so that no
    gradient is disturbed (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.1.2). Counts start anew.

    Returns:
        The tokens per expert that it acted on, as `tokens_per_expert`.

    Raises:
        ParallelError: a router beside experts has no selection bias (`e_score_correction_bias`, `expert_bias`).
    """
    modules, biases = expert_modules(model), {}
    for name in modules:
        biases[name] = _selection_bias(model, name)
    loads = tokens_per_expert(model, state)
    for name, load in loads.items():
        bias, load = biases[name], load.double()
        step = (rate * torch.sign(load.mean() - load)).to(device=bias.device, dtype=bias.dtype).view(bias.shape)
        if isinstance(bias, DTensor):
            step = distribute_tensor(step, bias.device_mesh, bias.placements, src_data_rank=None)
        bias.add_(step)
    return loads


def _link_of(module: nn.Module) -> Any:
    return module.__dict__.get(NAME)


def _is_known(module: nn.Module) -> bool:
    """Whether transformers' decorator made the module choose its function by name."""
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "has_gate")
        and hasattr(type(module).forward, "__wrapped__")
    )


def _is_dense(module: nn.Module) -> bool:
    """Whether the module is handed all tokens for each of its experts, [E * T, H], most of them zeros."""
    own = [parameter for _, parameter in module.named_parameters(recurse=False)]
    count = getattr(module, "num_experts", None)
    takes = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return len(takes) == 1 and bool(own) and all(p.ndim == 3 and p.shape[0] == count for p in own)


def _named(model: nn.Module, globs: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that the globs name; where adapters stand in a module's place, that inside of them."""
    found = find_named(model, globs, "ParallelPlan.experts")
    inside = {id(m.get_base_layer()) if is_adapter(m) else id(m) for m in found.values()}
    return {name: module for name, module in model.named_modules() if id(module) in inside}


def _check(name: str, module: nn.Module, ranks: int) -> None:
    sizes = {parameter.shape[0] if parameter.ndim else 0 for _, parameter in module.named_parameters(recurse=False)}
    if len(sizes) != 1:
        raise ParallelError(
            f"{name} ({type(module).__name__}) cannot be dealt over ranks: its own parameters must all have the experts"
            f" in dimension 0, but those are of sizes {sorted(sizes)}."
        )
    if not _is_known(module) and not _is_dense(module):
        try:
            inspect.signature(module.forward).bind(None, None, None)
        except TypeError:
            raise ParallelError(
                f"{name} ({type(module).__name__}) cannot be dealt over ranks: its forward must take (hidden, index,"
                f" weights), but it is forward{inspect.signature(module.forward)}."
            ) from None
    if (count := sizes.pop()) % ranks:
        raise ParallelError(f"{count} experts of {name} cannot be dealt evenly over ep={ranks} ranks.")


def _link(module: nn.Module, state: ParallelState, ranks: int, plan: PlanExchange, *, is_known: bool) -> None:
    own = list(module.named_parameters(recurse=False))
    count = own[0][1].shape[0]
    device = torch.device("cpu") if own[0][1].is_meta else own[0][1].device
    module.expert_parallel = ExpertLink(
        experts=count,
        group=state.ep.get_group() if ranks > 1 else None,
        tp_group=state.tp.get_group() if ranks > 1 and state.tp.size() > 1 else None,
        gradient_factor=state.expert_shard_mesh.size() / state.loss.size() if ranks > 1 else 1.0,
        plan=plan,
        inner=module.config._experts_implementation if is_known else None,
        counts=torch.zeros(count, dtype=torch.int64, device=device),
        first=state.ep.get_local_rank() * (count // ranks) if ranks > 1 else 0,
    )
    if _is_dense(module):
        module.forward = partial(_run_dense, module, module.forward)
    elif not is_known:
        module.forward = partial(_run, module, module.forward)
    if ranks == 1:
        return
    for name, parameter in own:
        part = parameter.detach().chunk(ranks)[state.ep.get_local_rank()].clone()
        part = part if part.is_meta else part.to(state.device)
        sharded = DTensor.from_local(part, state.ep, [Shard(0)], run_check=False)
        setattr(module, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
    if hasattr(module, "num_experts"):
        module.num_experts = count // ranks


def _register(model: nn.Module, known: dict[str, nn.Module]) -> None:
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _registered)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_experts_implementation(NAME)
    for name, module in known.items():
        if module.config._experts_implementation != NAME:
            raise ParallelError(
                f"The experts of {name} ({type(module).__name__}) do not choose their function by transformers'"
                " ExpertsInterface; use ep=1."
            )


def _registered(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Experts function of the registry: hidden [T, H], index [T, K], weights [T, K] -> [T, H]."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    inner = ALL_EXPERTS_FUNCTIONS.get_interface(_link_of(module).inner, type(module).forward.__wrapped__)
    return _run(module, partial(inner, module), hidden, index, weights, *args, **kwargs)


def _run(
    module: nn.Module,
    compute: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    link: ExpertLink = _link_of(module)
    rows = hidden.shape[0]
    if link.tp_group is not None:
        hidden, weights = (take_part(x, link.tp_group, 0) for x in (hidden, weights))
        index = take_part(index, link.tp_group, 0)
    counts = torch.zeros(link.experts + 1, dtype=torch.int64, device=index.device)
    flat = index.reshape(-1).clamp(max=link.experts)  # an index beyond the experts stands for none
    counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:-1]
    if link.group is None:
        return _CountTokens.apply(compute(hidden, index, weights, *args, **kwargs), counts, link)
    parts = {name: scale_gradient(p, link.gradient_factor) for name, p in local_parts(module).items()}
    parts = {name: adapted(part, name, link.adapters, link.first) for name, part in parts.items()}
    with parameters_replaced(module, parts):
        out = _exchanged(link, partial(compute, *args, **kwargs), hidden, flat, weights, counts)
    return out if link.tp_group is None else join_parts(out, link.tp_group, 0, rows)


def _run_dense(module: nn.Module, forward: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """[E * T, H] -> [E * T, H], where only rows that are not zero are computed."""
    tokens = hidden.shape[0] // _link_of(module).experts
    (rows,) = hidden.ne(0).any(-1).nonzero(as_tuple=True)  # [N]
    index = rows[:, None] // tokens
    compute = partial(_grouped, module, forward)
    out = _run(module, compute, hidden[rows], index, hidden.new_ones(len(rows), 1))
    return torch.zeros_like(hidden).index_copy(0, rows, out)


def _grouped(
    module: nn.Module, forward: Callable[..., torch.Tensor], hidden: torch.Tensor, index: torch.Tensor, *_: Any
) -> torch.Tensor:
    """Rows [N, H] for experts [N, 1] in the layout [E * T, H] of the module's own forward, and back."""
    count = next(iter(module._parameters.values())).shape[0]
    counts = torch.bincount(index[:, 0], minlength=count)
    longest = int(counts.max()) if len(hidden) else 1
    order = index[:, 0].argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first.repeat_interleave(counts)
    place += index[:, 0] * longest
    padded = hidden.new_zeros(count * longest, hidden.shape[1]).index_copy(0, place, hidden)
    return forward(padded)[place]


def _exchanged(
    link: ExpertLink,
    compute: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    flat: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """hidden: [T, H], flat: [T * K], weights: [T, K], counts: [E] -> [T, H]."""
    plan = link.plan(counts, link.group)
    order = torch.argsort(flat, stable=True)[: sum(plan.send)]  # pairs by expert, hence by the rank that holds it
    rows = exchange(hidden[order // weights.shape[1]], plan.send, plan.receive, link.group)  # [R, H]

    local = torch.arange(plan.rows.shape[1], device=flat.device).repeat(plan.rows.shape[0])
    local = local.repeat_interleave(plan.rows.reshape(-1), output_size=rows.shape[0])  # [R]
    received = rows.shape[0]
    if received == 0:  # one row of zeros, so that the experts take part in backward on this rank too
        rows, local = F.pad(rows, (0, 0, 0, 1)), local.new_zeros(1)
    out = compute(rows, local[:, None], rows.new_ones(rows.shape[0], 1))[:received]

    out = exchange(out.to(rows.dtype), plan.receive, plan.send, link.group)  # [T * K without none, H]
    pairs = out.new_zeros(flat.shape[0], out.shape[1]).index_copy(0, order, out)
    pairs = pairs.view(*weights.shape, -1) * weights[..., None]  # [T, K, H]
    return _CountTokens.apply(pairs, counts, link).sum(1).to(hidden.dtype)


class _CountTokens(torch.autograd.Function):
    """x -> x; a pass through backward adds to the counts of the link, once however often forward is recomputed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: torch.Tensor, link: ExpertLink) -> torch.Tensor:
        ctx.counts, ctx.link = counts, link
        # A view would be cheaper, but FSDP hangs the start of backward on what a module returns, and a change of a
        # view in place would drop it.
        return x.clone() if link.group is None else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.link.counts = ctx.link.counts.to(ctx.counts.device) + ctx.counts
        return gradient, None, None


def _selection_bias(model: nn.Module, experts: str) -> torch.Tensor:
    place = experts
    while place.endswith(".base_layer"):  # inside adapters
        place = place.removesuffix(".base_layer")
    parent = model.get_submodule(place.rpartition(".")[0])
    for name, tensor in (*parent.named_buffers(), *parent.named_parameters()):
        if name.rpartition(".")[2] in _SELECTION_BIASES:
            return tensor
    raise ParallelError(
        f"The router beside {experts} has no selection bias ({' or '.join(_SELECTION_BIASES)}) to balance by: use the"
        " model's router loss instead."
    )
