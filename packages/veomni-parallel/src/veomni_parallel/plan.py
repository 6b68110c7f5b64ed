"""What of a model is sharded as a unit, and what is left whole."""

from __future__ import annotations

from collections.abc import Sequence
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


def find_shard_units(model: nn.Module, plan: ParallelPlan) -> dict[str, nn.Module]:
    """The modules that become units of sharding and recomputation, by name, in the order of registration.

    Named by the plan, or by transformers' `_no_split_modules` of the model and of every model inside it, or else the
    repeated blocks: the children of each `ModuleList` that holds two or more of one class (outermost lists only).

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
        for name, module in model.named_modules():
            inside = any(name.startswith(unit + ".") for unit in units)
            if (
                isinstance(module, nn.ModuleList)
                and len(module) > 1
                and len({type(child) for child in module}) == 1
                and not inside
            ):
                units |= {f"{name}.{i}".lstrip("."): child for i, child in enumerate(module)}
    return {name: module for name, module in units.items() if any(True for _ in module.parameters())}


def find_whole_modules(model: nn.Module, plan: ParallelPlan) -> dict[str, nn.Module]:
    """The outermost modules that the plan's `no_shard` globs name.

    Raises:
        ParallelError: a glob matches no module.
    """
    whole: dict[str, nn.Module] = {}
    for glob in plan.no_shard:
        found = {name: module for name, module in model.named_modules() if name and fnmatchcase(name, glob)}
        if not found:
            raise ParallelError(f"ParallelPlan.no_shard: {glob!r} matches no module of {type(model).__name__}.")
        whole |= found
    return {name: m for name, m in whole.items() if not any(name.startswith(other + ".") for other in whole)}
