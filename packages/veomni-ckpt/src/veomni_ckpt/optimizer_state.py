"""An optimizer's state by parameter name: what any layout writes and any other layout reads, bit for bit.

A state has two halves. Its tensors (momenta, step counters) go to DCP as `optimizer.state.NAME.KEY`; the param groups'
hyperparameters and all that is not a tensor form a small document of plain values.

torch's own `get_optimizer_state_dict` is used only where it must be, for FSDP1's flattened parameters: it makes an
optimizer that has not stepped take a step, which counts, and loading casts states to the parameter's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.names import is_fsdp1, named_tensors, some

Tensors = dict[str, dict[str, torch.Tensor]]  # parameter name -> state key -> tensor
Document = dict[str, Any]
"""`class`, the optimizer's; `param_groups` [{"params": [names], "lr": ...}]; `state` {name: {key: plain value}}."""


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Document]:
    """Both halves of the optimizer's state; nothing is copied and the optimizer is left as it is.

    A collective for FSDP1.

    Raises:
        CheckpointError: the optimizer holds a parameter that is not in the model.
    """
    groups = _named_groups(model, optimizer)
    if not is_fsdp1(model):
        names = _names_by_id(model)
        state = {names[id(parameter)]: values for parameter, values in optimizer.state.items()}
    else:
        state = get_optimizer_state_dict(model, optimizer)["state"] if _any_rank_has_state(optimizer) else {}
    tensors: Tensors = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, values in state.items():
        for key, value in values.items():
            half: dict[str, dict[str, Any]] = tensors if isinstance(value, torch.Tensor) else plain
            half.setdefault(name, {})[key] = value
    return tensors, {"class": type(optimizer).__name__, "param_groups": groups, "state": plain}


def join(documents: list[Document]) -> Document:
    """One document of several optimizers, each of which holds other parameters; of what several hold, the first's."""
    groups: list[dict[str, Any]] = []
    state: dict[str, dict[str, Any]] = {}
    known: set[str] = set()
    for document in documents:
        for group in document["param_groups"]:
            groups.append({**group, "params": [name for name in group["params"] if name not in known]})
        known |= {name for group in document["param_groups"] for name in group["params"]}
        state = {**document["state"], **state}
    return {"class": documents[0]["class"], "param_groups": groups, "state": state}


def match_groups(
    model: nn.Module, optimizer: torch.optim.Optimizer, document: Document
) -> tuple[list[dict[str, Any]], list[str]]:
    """The saved hyperparameters for each of the optimizer's param groups, however they were grouped when saved.

    Returns:
        One dict for each group; and the parameters that were saved and this optimizer does not hold.

    Raises:
        CheckpointError: another class of optimizer was saved, one of this one's parameters was not saved, or a group
            would get two values of one hyperparameter.
    """
    known = [kind.__name__ for kind in type(optimizer).__mro__]
    if (kind := document.get("class", known[0])) not in known:
        raise CheckpointError(
            f"it has the state of the optimizer {kind}, and {known[0]} cannot go on with it: make the one that it was "
            "saved with, or load the weights alone"
        )
    groups = _named_groups(model, optimizer)
    saved = {name: group for group in document["param_groups"] for name in group["params"]}
    ours = [name for group in groups for name in group["params"]]
    if missing := [name for name in ours if name not in saved]:
        raise CheckpointError(f"no optimizer state was saved for {some(missing)}")
    matched = []
    for number, group in enumerate(groups):
        sources = [{key: value for key, value in saved[name].items() if key != "params"} for name in group["params"]]
        first = sources[0] if sources else {}
        for name, source in zip(group["params"], sources, strict=True):
            if differing := sorted(key for key in first if source.get(key) != first[key]):
                raise CheckpointError(
                    f"param group {number} mixes parameters that were saved with different {differing[0]!r}: "
                    f"{group['params'][0]} and {name} were in different groups"
                )
        matched.append(first)
    return matched, sorted(saved.keys() - set(ours))


def allocate(model: nn.Module, optimizer: torch.optim.Optimizer, metadata: Metadata) -> Tensors:
    """A tensor to read each saved one into, laid out over the ranks as its parameter is.

    The optimizer's own tensors are taken where it has them. A collective for FSDP1.

    Raises:
        CheckpointError: a saved state has another shape than its sharded parameter, and the optimizer, which has not
            stepped, cannot show how that is laid out.
    """
    own = {name for group in _named_groups(model, optimizer) for name in group["params"]}
    entries = metadata.state_dict_metadata
    saved = {path[2:]: entries[key] for key, path in _state_entries(metadata) if path[2] in own}
    targets: Tensors = {}
    if is_fsdp1(model):
        if saved:
            # torch makes the layout of flattened parameters by a step with zero gradients, if there are no others
            optimizer.zero_grad(set_to_none=True)
            state = get_optimizer_state_dict(model, optimizer)["state"]
            for name, key in saved:
                if key not in state.get(name, {}):
                    raise CheckpointError(
                        f"{name} was saved with an optimizer state {key!r}, which this optimizer has not"
                    )
                targets.setdefault(name, {})[key] = state[name][key]
        return targets

    parameters = _parameters_by_name(model, optimizer)
    for (name, key), entry in saved.items():
        parameter, group = parameters[name]
        size, dtype = entry.size, entry.properties.dtype
        present = optimizer.state[parameter].get(key) if parameter in optimizer.state else None
        if isinstance(present, torch.Tensor) and present.size() == size and present.dtype == dtype:
            target = present.detach()
        elif key == "step":
            # as torch.optim places it: where a fused or captured kernel reaches it, else on the host
            on_device = group.get("capturable") or group.get("fused")
            target = torch.empty(size, dtype=dtype, device=parameter.device if on_device else "cpu")
        elif size == parameter.size():
            target = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        elif len(size) == 0 or not isinstance(parameter, DTensor):
            target = torch.empty(size, dtype=dtype, device=parameter.device)
        else:
            raise CheckpointError(
                f"the optimizer state {key!r} of {name} has the shape {list(size)}, the parameter "
                f"{list(parameter.size())}: only an optimizer that has stepped once shows how that is sharded"
            )
        targets.setdefault(name, {})[key] = target
    return targets


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Tensors,
    document: Document,
    matched_groups: list[dict[str, Any]],
) -> None:
    """Give the optimizer exactly the saved state: tensors, plain values and hyperparameters. A collective for FSDP1."""
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in tensors.items()}
    own = {name for group in _named_groups(model, optimizer) for name in group["params"]}
    for name, values in document["state"].items():
        if name in own:
            state.setdefault(name, {}).update(values)
    if is_fsdp1(model) and state:
        groups = _named_groups(model, optimizer)
        # not strict: a parameter that never had a gradient has no state
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)
    else:
        optimizer.state.clear()
        parameters = _parameters_by_name(model, optimizer)
        for name, values in state.items():
            optimizer.state[parameters[name][0]] = values
    for group, saved in zip(optimizer.param_groups, matched_groups, strict=True):
        for key, value in saved.items():
            if isinstance(value, torch.Tensor) and isinstance(group.get(key), torch.Tensor):
                value = value.to(group[key].device)
            group[key] = value


def _state_entries(metadata: Metadata) -> list[tuple[str, tuple[Any, ...]]]:
    """(key in the checkpoint, ("optimizer", "state", parameter name, state key)) of every optimizer tensor."""
    return [
        (key, tuple(path))
        for key, path in (metadata.planner_data or {}).items()
        if tuple(path[:2]) == ("optimizer", "state")
        and len(path) == 4
        and isinstance(metadata.state_dict_metadata.get(key), TensorStorageMetadata)
    ]


def _names_by_id(model: nn.Module) -> dict[int, str]:
    """id of each tensor of the model -> the first of its names."""
    names: dict[int, str] = {}
    for name, tensor in named_tensors(model):
        names.setdefault(id(tensor), name)
    return names


def _named_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's param groups with names in the place of parameters."""
    names = _names_by_id(model)
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            name = names.get(id(parameter))
            if name is None:
                raise CheckpointError(
                    f"parameter {position} of the optimizer's group {number} (shape {list(parameter.size())}) is not "
                    "in the model: make the optimizer after the model is sharded"
                )
            if name.endswith("_flat_param"):
                raise CheckpointError("the model's parameters are flattened: wrap it with FSDP1's use_orig_params=True")
        groups.append({**group, "params": [names[id(parameter)] for parameter in group["params"]]})
    return groups


def _parameters_by_name(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, tuple[torch.Tensor, dict[str, Any]]]:
    """Name -> the optimizer's parameter and the param group that it is in."""
    names = _names_by_id(model)
    return {names[id(p)]: (p, group) for group in optimizer.param_groups for p in group["params"]}


def _any_rank_has_state(optimizer: torch.optim.Optimizer) -> bool:
    """FSDP1 only: a rank whose shards are all empty has no state of its own."""
    answers: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(answers, bool(optimizer.state))
    return any(answers)
