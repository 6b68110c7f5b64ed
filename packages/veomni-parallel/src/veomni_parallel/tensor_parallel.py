"""Tensor parallelism: each rank holds a part of a matrix, by a plan that names a style for each module.

The styles are those of transformers' plans. Each is a change of the module's forward around which plain autograd runs:
a collective where activations of ranks meet, with its adjoint in backward. Parameters become DTensors over `state.tp`;
forward computes on their local parts. (Megatron-LM, https://arxiv.org/abs/1909.08053)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from veomni_parallel.collectives import join_parts, sum_gradients, sum_gradients_once, sum_parts, take_part
from veomni_parallel.errors import ParallelError
from veomni_parallel.local_parameters import local_parts, parameters_replaced
from veomni_parallel.mesh import Mesh, ParallelState
from veomni_parallel.ulysses_diffusers import is_diffusers_model
from veomni_parallel.vocabulary_parallel import use_vocabulary_parallel_loss

_HEADS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "qkv_proj", "query_key_value")
"""Last parts of the names of projections whose outputs are heads."""

_SLICED = "tensor_parallel_vectors"
"""Attribute of a module: its vectors that are divided, and how many packed parts each has.

They stay whole parameters, of which forward takes this rank's part. FSDP would cut a DTensor that is divided in its
only dimension into strided pieces, which torch handles for even sizes only.
"""

PACKED = 2
"""Matrices that a packed weight joins (gate and up projection), each of which is divided over the ranks."""


@dataclass(frozen=True)
class _Site:
    """A module that gets a style."""

    name: str
    module: nn.Module
    mesh: Any
    root: nn.Module

    @property
    def group(self) -> Any:
        return self.mesh.get_group()


@dataclass(frozen=True)
class _Divided:
    """A parameter that was replaced."""

    new: nn.Parameter
    dim: int
    packed: bool
    old: nn.Parameter
    """Kept until all names are seen, so that no other parameter takes its id."""


_UNUSABLE = {
    *("doge", "gemma3n", "gemma3n_text", "gemma4", "glm5_next"),
    *("inkling_text", "inkling_mm_model", "inkling2_text", "inkling2"),
}
"""Model types whose plans divide what needs all features (the spread of the gates of Gemma 3n), or heads unevenly."""


def apply_tensor_parallel(
    model: nn.Module, state: ParallelState, plan: Mapping[str, str] | None = None, *, exclude: tuple[str, ...] = ()
) -> dict[str, str]:
    """Divide the matrices of `model` over `state.tp`. Call it before sharding; `build_parallelize_model` does.

    Args:
        model: with equal weights on all ranks, or on meta.
        state: from `init_parallel_state`.
        plan: style by name of module or parameter, where `*` stands for one part of a dotted name; None: the model's
            own (`tp_plan` of transformers). Styles: those of transformers, and "vocabulary_parallel" for an output
            head whose logits stay divided, with a loss that is exact on the parts.
        exclude: names of modules that keep what they have, with all inside (experts that are dealt over ranks).

    Returns:
        The styles by the full names that they were applied to.

    Raises:
        ParallelError: the model has no plan, a given name matches nothing, a style is unknown or does not fit its
            module, or `state.tp` does not divide heads or a dimension.
    """
    given, title = plan, type(model).__name__
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if plan is None and kind in _UNUSABLE:
        raise ParallelError(
            f"The tensor parallel plan that transformers has for {title} fails or changes results: use tp=1, or give"
            " another by ParallelPlan(tp=...)."
        )
    if plan is None and not (plan := _own_plan(model)):
        raise ParallelError(
            f"{title} has no tensor parallel plan of its own: use tp=1, or give one by"
            ' ParallelPlan(tp={"layers.*.up": "colwise", "layers.*.down": "rowwise"}).'
        )
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in _STYLES:
            raise ParallelError(
                f"ParallelPlan.tp: {style!r} of {pattern!r} is none of the styles {', '.join(sorted(_STYLES))}."
            )
        match = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+")).fullmatch
        found = [name for name in (*modules, *parameters) if match(name)]
        if not found and given is not None:
            raise ParallelError(f"ParallelPlan.tp: {pattern!r} matches no module or parameter of {title}.")
        styles |= dict.fromkeys(found, style)
    styles = {n: s for n, s in styles.items() if not any(n == e or n.startswith(e + ".") for e in exclude)}
    _join_tied(styles, modules, parameters)
    if given is None:
        _join_between(styles, modules)

    for name, style in styles.items():
        _check_heads(name, style, modules, state.tp.size())
    divided: dict[int, _Divided] = {}
    for name, style in styles.items():
        if name in parameters:
            owner, _, own = name.rpartition(".")
            _divide(name, modules[owner], own, style, state.tp, divided)
        else:
            for own, _ in list(modules[name].named_parameters(recurse=False)):
                if style in _DIMENSIONS:
                    _divide(f"{name}.{own}", modules[name], own, style, state.tp, divided)
    for name, style in styles.items():
        if name in modules:
            _check_experts(name, style, modules[name])
            _STYLES[style](_Site(name, modules[name], state.tp, model))
    return styles


def _own_plan(model: nn.Module) -> dict[str, str]:
    """The plans of the outermost models of transformers inside, with full names."""
    plan: dict[str, str] = {}
    covered: list[str] = []
    for name, module in model.named_modules():
        own = getattr(module, "_tp_plan" if is_diffusers_model(module) else "tp_plan", None)
        inside = any(not outer or name == outer or name.startswith(outer + ".") for outer in covered)
        if isinstance(own, Mapping) and own and not inside:
            covered.append(name)
            plan |= {f"{name}.{key}".lstrip("."): style for key, style in own.items()}
    return plan


def _join_tied(
    styles: dict[str, str], modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Embedding and head that share a weight are divided both, also where the plan names one of them."""
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for names in owners.values():
        divided = [name for name in names if _DIMENSIONS.get(styles.get(name, "")) in ("out", "rows")]
        for name in set(names) - set(styles) if divided else ():
            tied = {nn.Embedding: "embedding_rowwise", nn.Linear: "colwise_gather_output"}
            style = next((style for kind, style in tied.items() if isinstance(modules[name], kind)), None)
            if style is None:
                raise ParallelError(f"ParallelPlan.tp: {name} shares the weight of {divided[0]}, but has no style.")
            styles[name] = style


def _join_between(styles: dict[str, str], modules: Mapping[str, nn.Module]) -> None:
    """Parameters between divided matrices see a part of the features, or of the heads, on each rank.

    Those of activation functions, and of norms of single heads that the model's plan left out (q_norm beside q_proj).
    """
    between: dict[str, set[str]] = {}
    for name, style in styles.items():
        between.setdefault(name.rpartition(".")[0], set()).add(style)
    for owner, kinds in between.items():
        for name, child in modules[owner].named_children() if {"colwise", "rowwise"} <= kinds else ():
            own, full = list(child.named_parameters(recurse=False)), f"{owner}.{name}".lstrip(".")
            scalars = name.startswith("act") and all(p.numel() == 1 for _, p in own)
            projection = modules.get(f"{owner}.{_projection_before(name)}".lstrip("."))
            width = getattr(projection, "out_features", 0)
            of_a_head = all(p.numel() < width and width % p.numel() == 0 for _, p in own)
            if own and full not in styles and (scalars or of_a_head):
                styles[full] = "replicated_with_grad_allreduce"


def _projection_before(norm: str) -> str:
    """The name of the projection beside a norm of single heads: q_norm, and norm_q and norm_added_q of diffusers."""
    if norm.endswith("_norm"):
        return norm.removesuffix("_norm") + "_proj"
    before, _, features = norm.rpartition("_")
    return {"norm": f"to_{features}", "norm_added": f"add_{features}_proj"}.get(before, "")


def _check_heads(name: str, style: str, modules: Mapping[str, nn.Module], ranks: int) -> None:
    owner, _, last = name.rpartition(".")
    config = getattr(modules.get(owner), "config", None)
    if style != "colwise" or last not in (
        "q_proj",
        "k_proj",
        "v_proj",
        "q_b_proj",
        "kv_b_proj",
        "qkv_proj",
        "query_key_value",
    ):
        return
    for key in ("num_attention_heads", "num_key_value_heads"):
        if isinstance(heads := getattr(config, key, None), int) and heads % ranks:
            raise ParallelError(
                f"{heads} heads ({key} of {type(modules[owner]).__name__}) cannot be divided over tp={ranks} ranks."
            )


def _check_experts(name: str, style: str, module: nn.Module) -> None:
    whole = [own for own, p in module.named_parameters(recurse=False) if not isinstance(p, DTensor)]
    if style == "moe_tp_experts" and whole:
        raise ParallelError(
            f"The experts of {name} cannot be divided over tp: the plan leaves {', '.join(whole)} whole; use ep."
        )


def _dimension(style: str, name: str, parameter: torch.Tensor) -> int | None:
    """Along which dimension a style divides a parameter; None: it stays whole.

    A weight is [out, in] or, of experts, [E, out, in]; a bias [out] or [E, out].
    """
    kind = _DIMENSIONS[style]
    is_bias = name.endswith("bias") or parameter.ndim == 1
    if kind == "in":
        return None if is_bias else parameter.ndim - 1
    if kind == "rows":
        return 0
    if kind == "columns":
        return 1
    return parameter.ndim - 1 if is_bias else parameter.ndim - 2


def _divide(
    name: str,
    module: nn.Module,
    own: str,
    style: str,
    mesh: Mesh,
    divided: dict[int, _Divided],
) -> None:
    """Replace a parameter by a DTensor over `mesh`; one that is shared by several modules stays shared."""
    parameter = module._parameters[own]
    if parameter is None:
        return
    if style not in _DIMENSIONS:
        if style == "replicate":
            return
        raise ParallelError(f"ParallelPlan.tp: {style!r} is for modules, but {name} is a parameter.")
    if any(parameter is done.new for done in divided.values()):
        return  # its own entry and its module's name the same
    dim = _dimension(style, own, parameter)
    if id(parameter) in divided:
        done = divided[id(parameter)]
        if (done.dim, done.packed) != (dim, style.startswith("packed")):
            raise ParallelError(f"ParallelPlan.tp: {name} is shared with another module that divides it differently.")
        module._parameters[own] = done.new
        return
    if dim is None:
        return
    ranks, rank, parts = mesh.size(), mesh.get_local_rank(), PACKED if style.startswith("packed") else 1
    if parameter.shape[dim] % (ranks * parts):
        raise ParallelError(
            f"Dimension {dim} of {name} {list(parameter.shape)} cannot be divided over tp={ranks} ranks: pad it, or"
            f" give a ParallelPlan(tp=...) without it."
        )
    if parameter.ndim == 1:
        module.__dict__.setdefault(_SLICED, {})[own] = parts
        return
    pieces = [part.chunk(ranks, dim)[rank] for part in parameter.detach().chunk(parts, dim)]
    local = torch.cat(pieces, dim).contiguous()
    local = local if local.is_meta else local.to(mesh.device_type)
    placement = _StridedShard(dim, split_factor=parts) if parts > 1 else Shard(dim)
    sharded = DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    new = nn.Parameter(sharded, requires_grad=parameter.requires_grad)
    divided[id(parameter)] = _Divided(new, dim, parts > 1, parameter)
    module._parameters[own] = new


def _wrap(site: _Site, forward: Callable[..., Any]) -> None:
    """Replace the module's forward by `forward(original, *args, **kwargs)`."""
    original = site.module.forward
    site.module.forward = functools.wraps(original)(functools.partial(forward, original))


def _parts(site: _Site) -> dict[str, torch.Tensor]:
    """This rank's parts of the module's own parameters that are divided."""
    parts, ranks = local_parts(site.module), site.mesh.size()
    for name, packed in site.module.__dict__.get(_SLICED, {}).items():
        vector = sum_gradients(site.module._parameters[name], site.group)
        parts[name] = vector.view(packed, ranks, -1)[:, site.mesh.get_local_rank()].reshape(-1)
    return parts


def _whole_input(site: _Site) -> None:
    """x [..., in] on all ranks -> [..., out / P], of packed outputs this rank's part of each, joined."""

    def forward(original: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with parameters_replaced(site.module, _parts(site)):
            return original(sum_gradients_once(x, site.group), *args, **kwargs)

    _wrap(site, forward)


def _gathered_output(site: _Site) -> None:
    """x [..., in] on all ranks -> [..., out] on all ranks."""
    length = _weight(site).shape[0]
    _whole_input(site)
    _wrap(site, lambda original, *args, **kwargs: join_parts(original(*args, **kwargs), site.group, -1, length))


def _summed_output(site: _Site) -> None:
    """x [..., in / P] -> [..., out] on all ranks; the bias is added once, to the sum."""

    def forward(original: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        bias = site.module._parameters.get("bias")
        without = {} if bias is None else {"bias": None}
        with parameters_replaced(site.module, _parts(site) | without):
            out = sum_parts(original(x, *args, **kwargs), site.group)
        return out if bias is None else out + bias

    _wrap(site, forward)


def _split_input(site: _Site) -> None:
    """x [..., in] on all ranks -> [..., out] on all ranks."""
    _summed_output(site)
    _wrap(site, lambda original, x, *args, **kwargs: original(take_part(x, site.group, -1), *args, **kwargs))


def _embedding_rows(site: _Site) -> None:
    """ids on all ranks -> [..., H] on all ranks; each rank looks up the ids that it holds."""
    module: Any = site.module
    rows = _weight(site).shape[0] // site.mesh.size()
    start, padding = rows * site.mesh.get_local_rank(), getattr(module, "padding_idx", None)
    if padding is not None:
        # torch gives the row of this index no gradient; counted in local rows, if it is one
        module.padding_idx = padding - start if start <= padding < start + rows else None

    def forward(original: Any, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        local = ids - start
        elsewhere = (local < 0) | (local >= rows)
        with parameters_replaced(module, _parts(site)):
            out = original(local.masked_fill(elsewhere, 0), *args, **kwargs)
        return sum_parts(out.masked_fill(elsewhere[..., None], 0), site.group)

    _wrap(site, forward)


def _embedding_columns(site: _Site) -> None:
    """ids on all ranks -> [..., H] on all ranks; each rank looks up a part of every vector."""
    length = _weight(site).shape[1]

    def forward(original: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with parameters_replaced(site.module, _parts(site)):
            return join_parts(original(*args, **kwargs), site.group, -1, length)

    _wrap(site, forward)


def _summed_gradient(site: _Site) -> None:
    """Whole parameters that each rank applies to its part of the heads or of the row."""

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        own = site.module.named_parameters(recurse=False)
        with parameters_replaced(site.module, {name: sum_gradients(p, site.group) for name, p in own}):
            return original(*args, **kwargs)

    _wrap(site, forward)


def _mla_key_value(site: _Site) -> None:
    """Output [..., latent + rope], on all ranks; the rope part goes to each rank's heads without another projection."""
    configs = [config for m in site.root.modules() if (config := getattr(m, "config", None)) is not None]
    parent = site.root.get_submodule(site.name.rpartition(".")[0])
    configs.insert(0, getattr(parent, "config", None))
    rope = next((dim for c in configs if isinstance(dim := getattr(c, "qk_rope_head_dim", None), int)), None)
    if rope is None:
        raise ParallelError(f"ParallelPlan.tp: {site.name} is mla_kv_a_proj, but no config has qk_rope_head_dim.")

    def forward(original: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(*args, **kwargs)
        latent, rotated = out.split([out.shape[-1] - rope, rope], dim=-1)
        return torch.cat([latent, sum_gradients(rotated, site.group)], dim=-1)

    _wrap(site, forward)


def _all_reduce(site: _Site) -> None:
    """A module that computes a part of a sum: the sum, on all ranks."""
    _wrap(site, lambda original, *args, **kwargs: sum_parts(original(*args, **kwargs), site.group))


def _experts(site: _Site) -> None:
    """Experts whose matrices are divided: hidden [T, H], index [T, K], weights [T, K] on all ranks -> [T, H] on all."""

    def forward(original: Any, hidden: torch.Tensor, *routing: Any, **kwargs: Any) -> torch.Tensor:
        hidden = sum_gradients(hidden, site.group)
        routing = tuple(
            sum_gradients(x, site.group) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in routing
        )
        with parameters_replaced(site.module, _parts(site)):
            return sum_parts(original(hidden, *routing, **kwargs), site.group)

    _wrap(site, forward)


def _share_of_identity(site: _Site) -> None:
    """An expert without weights, whose output is summed over the ranks with the others'."""
    _wrap(site, lambda original, x, *args, **kwargs: original(x / site.mesh.size(), *args, **kwargs))


def _local(site: _Site) -> None:
    """A module that uses divided parameters of its own (attention sinks)."""

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        with parameters_replaced(site.module, _parts(site)):
            return original(*args, **kwargs)

    _wrap(site, forward)


def _divided_logits(site: _Site) -> None:
    """x [..., H] on all ranks -> logits [..., V / P], and a loss that takes them."""
    _whole_input(site)
    use_vocabulary_parallel_loss(site.root, site.mesh)


def _nothing(site: _Site) -> None:
    """The module stays as it is; its parameters are divided by their own entries, or not at all."""


def _not_tensor_parallel(site: _Site) -> None:
    raise ParallelError(f"ParallelPlan.tp: the style of {site.name} deals experts over ranks; that is what ep is for.")


def _weight(site: _Site) -> torch.Tensor:
    weight = getattr(site.module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        raise ParallelError(
            f"ParallelPlan.tp: the style of {site.name} needs a module with a weight [out, in], but that is a"
            f" {type(site.module).__name__}."
        )
    return weight


_STYLES: dict[str, Callable[[_Site], None]] = {
    "colwise": _whole_input,
    "colwise_gather_output": _gathered_output,
    "colwise_rep": _gathered_output,
    "rowwise": _summed_output,
    "rowwise_rep": _split_input,
    "rowwise_split_input": _split_input,
    "packed_colwise": _whole_input,
    "packed_rowwise": _summed_output,
    "embedding_rowwise": _embedding_rows,
    "embedding_colwise": _embedding_columns,
    "replicated_with_grad_allreduce": _summed_gradient,
    "sequence_parallel": _summed_gradient,
    "mla_kv_a_proj": _mla_key_value,
    "all_reduce": _all_reduce,
    "moe_tp_experts": _experts,
    "moe_identity_expert": _share_of_identity,
    "local_params": _local,
    "replicate": _nothing,
    "vocabulary_parallel": _divided_logits,
    "grouped_gemm": _not_tensor_parallel,
    "ep_dispatch_experts": _not_tensor_parallel,
}

_DIMENSIONS = {
    "colwise": "out",
    "colwise_gather_output": "out",
    "colwise_rep": "out",
    "packed_colwise": "out",
    "vocabulary_parallel": "out",
    "rowwise": "in",
    "rowwise_rep": "in",
    "rowwise_split_input": "in",
    "packed_rowwise": "in",
    "embedding_rowwise": "rows",
    "embedding_colwise": "columns",
}
