"""What of a model is sharded as a unit, what is left whole, and what is divided in other ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from veomni_parallel.errors import ParallelError


@dataclass(frozen=True)
class ParallelPlan:
    """How to cut a model; plain data, so that a model's author or a config can write it down."""

    shard_units: Sequence[str] | None = None
    """Class names of the modules that are gathered, computed and freed one at a time; None: found from the model."""
    no_shard: Sequence[str] = ()
    """Globs of module names ("encoders.*.norm") whose parameters every rank keeps whole (FSDP2; DDP always does)."""
    experts: Sequence[str] | None = None
    """Globs of module names of experts to deal over `state.ep`; None: found from the model."""
    tp: Mapping[str, str] | None = None
    """Style by name of module or parameter, see `apply_tensor_parallel`; None: the model's own plan."""


def find_shard_units(model: nn.Module, plan: ParallelPlan) -> dict[str, nn.Module]:
    """The modules that become units of sharding and recomputation, by name, in the order of registration.

    Named by the plan, or by transformers' `_no_split_modules` of the model and of every model inside it, or else the
    repeated blocks: the children of each `ModuleList` or `Sequential` that holds two or more of one class that has
    modules inside (outermost lists only), or, where no list has such, of any class. A module that shares a parameter
    with the rest (a head that is tied to the embedding) is none.

    Raises:
        ParallelError: the plan names a class of which the model has no module.
    """
    if plan.shard_units is not None:
        names = set(plan.shard_units)
        if missing := names - {type(module).__name__ for module in model.modules()}:
            raise ParallelError(
                f"ParallelPlan.shard_units names {sorted(missing)}, but {type(model).__name__} has no such module."
            )
    else:
        names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    units = {name: module for name, module in model.named_modules() if name and type(module).__name__ in names}
    if not units and plan.shard_units is None:
        units = _repeated_blocks(model, nested=True) or _repeated_blocks(model, nested=False)
    owners = _owners(model)
    return {
        name: module
        for name, module in units.items()
        if any(True for _ in module.parameters()) and not _shares(name, module, owners)
    }


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter by its id."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _shares(name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> bool:
    """Whether a parameter of the module is one of another module outside of it, too."""
    return any(not owner.startswith(name + ".") for p in module.parameters() for owner in owners[id(p)])


def _repeated_blocks(model: nn.Module, *, nested: bool) -> dict[str, nn.Module]:
    units: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _inside(name, units) or not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        if len({type(child) for child in module}) == 1 and (not nested or any(True for _ in module[0].children())):
            units |= {f"{name}.{i}".lstrip("."): child for i, child in enumerate(module)}
    return units


def find_whole_modules(model: nn.Module, plan: ParallelPlan) -> dict[str, nn.Module]:
    """The outermost modules that the plan's `no_shard` globs name.

    Raises:
        ParallelError: a glob matches no module.
    """
    return outermost(find_named(model, plan.no_shard, "ParallelPlan.no_shard"))


def find_frozen_units(model: nn.Module, units: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The outermost modules outside of `units` that are frozen as a whole and have modules inside.

    A leaf stays with its surroundings: embeddings and heads are used by their weight, too. So does a module without a
    forward of its own, one that shares a parameter with the rest, and one that holds the embedding or head of the whole
    model, which is called from outside of it.
    """
    getters = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    ends = [end for getter in getters if getter is not None and (end := getter()) is not None]
    owners = _owners(model)
    frozen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if not name or name in units or _inside(name, units) or _inside(name, frozen) or not parameters:
            continue
        if any(parameter.requires_grad for parameter in parameters) or not any(True for _ in module.children()):
            continue
        if any(inner is end for inner in module.modules() for end in ends):
            continue
        if not _shares(name, module, owners) and type(module).forward is not nn.Module.forward:
            frozen[name] = module
    return frozen


def find_named(model: nn.Module, globs: Sequence[str], option: str) -> dict[str, nn.Module]:
    """All modules whose name one of the globs matches.

    Raises:
        ParallelError: a glob matches no module; the message names `option`.
    """
    named: dict[str, nn.Module] = {}
    for glob in globs:
        found = {name: module for name, module in model.named_modules() if name and fnmatchcase(name, glob)}
        if not found:
            raise ParallelError(f"{option}: {glob!r} matches no module of {type(model).__name__}.")
        named |= found
    return named


def outermost(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that lie in none of the others."""
    return {name: module for name, module in modules.items() if not _inside(name, modules)}


def _inside(name: str, outer: Iterable[str]) -> bool:
    return any(name.startswith(other + ".") for other in outer)
