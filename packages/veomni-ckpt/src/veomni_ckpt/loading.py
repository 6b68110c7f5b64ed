"""One load: a checkpoint held against its manifest, fitted to the model, and read into it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from veomni_ckpt import manifest, optimizer_state, state_tree
from veomni_ckpt.agreement import agree, gather, is_first
from veomni_ckpt.dcp_files import SafeReader, read_metadata, verify_ranges
from veomni_ckpt.errors import CheckpointError, DamagedCheckpointError
from veomni_ckpt.names import frozen_names, is_fsdp1, reshard, some
from veomni_ckpt.strided_shards import with_pieces


def load(
    step_folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    group: dist.ProcessGroup | None,
    strict: bool,
) -> Any:
    """Read a checkpoint into the model and the optimizer; returns the extra state. A collective.

    Raises:
        DamagedCheckpointError: on every rank: files are missing or not what was saved.
        CheckpointError: on every rank: it does not fit.
    """
    reshard(model)
    failure: BaseException | None = None
    files, folder, metadata = manifest.Manifest({}), step_folder, Metadata({})
    extra_state, document, plain = None, None, {}
    try:
        if not step_folder.is_dir():
            raise DamagedCheckpointError(f"there is no checkpoint {step_folder}")
        files = manifest.read(step_folder)
        folder = step_folder / files.folder if files.folder else step_folder
        if is_first(group):
            files.check_files(folder)
        metadata = read_metadata(folder / ".metadata", files.content(folder, ".metadata"))
        if is_first(group):
            verify_ranges(folder, metadata, {name: size for name, (size, _) in files.files.items()})
        extra_state = _values(folder, files, "extra_state")
        if "model.json" in files.files:
            plain = _values(folder, files, "model")
        if "optimizer.json" in files.files or _has_optimizer(metadata):
            document = _values(folder, files, "optimizer")
    except Exception as error:
        failure = error
    agree(failure, group, kind=DamagedCheckpointError)

    context = f"{step_folder} does not fit: "
    model_state: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    unexpected: list[str] = []
    unexpected_states: list[str] = []
    try:
        if optimizer is not None:
            if not strict:
                raise CheckpointError("an optimizer needs all weights: give none, or strict=True")
            if document is None:
                raise CheckpointError("it was saved without an optimizer: give none to load the weights alone")
            groups, unexpected_states = optimizer_state.match_groups(model, optimizer, document)
        model_state = get_model_state_dict(model)
        saved = _saved(metadata, plain)
        unexpected = sorted(set(saved) - set(model_state))
        chosen = {name: value for name, value in model_state.items() if name in saved}
        missing = [name for name in model_state if name not in saved]
        if files.trainable_only:
            frozen = frozen_names(model)
            missing = [name for name in missing if name not in frozen]
        if missing and strict:
            raise CheckpointError(f"it has no {some(missing)}, which the model has")
        if missing and not chosen:
            raise CheckpointError("it has none of the model's weights")
        if missing and is_first(group):
            warnings.warn(f"{step_folder} has no {some(missing)}, which stays as it is", stacklevel=3)
        _check_kinds(chosen, saved)
    except Exception as error:
        failure = error
    agree(failure, group, context=context)
    # what this rank lacks another may have, where ranks hold different layers
    unexpected, unexpected_states = _in_all(unexpected, group), _in_all(unexpected_states, group)
    if unexpected and strict:
        raise CheckpointError(f"{context}it has {some(unexpected)}, which the model has not")
    if unexpected_states:
        states = some(unexpected_states)
        raise CheckpointError(f"{context}optimizer state was saved for {states}, which this optimizer does not hold")
    if unexpected and is_first(group):
        warnings.warn(f"{step_folder} has {some(unexpected)}, which the model has not", stacklevel=3)

    optimizer_tensors: optimizer_state.Tensors = {}
    try:
        if optimizer is not None:
            optimizer_tensors = optimizer_state.allocate(model, optimizer, metadata)
    except Exception as error:
        failure = error
    agree(failure, group, context=context)

    flat = {f"model.{name}": value for name, value in chosen.items() if name not in plain}
    for name, values in optimizer_tensors.items():
        flat |= {f"optimizer.state.{name}.{key}": value for key, value in values.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                with_pieces(flat),
                storage_reader=SafeReader(folder, metadata),
                process_group=group,
                no_dist=group is None,
            )
    except (Exception, CheckpointException) as error:
        failure = error
    agree(failure, group, kind=DamagedCheckpointError, context=f"{step_folder} cannot be read: ")

    if optimizer is not None and document is not None:
        optimizer_state.restore(model, optimizer, optimizer_tensors, document, groups)
    loaded = {name: plain[name] if name in plain else flat[f"model.{name}"] for name in chosen}
    if is_fsdp1(model):
        loaded = {**model_state, **loaded}  # it flattens all parameters of a unit anew
    # names were compared above
    set_model_state_dict(model, loaded, options=StateDictOptions(strict=False))
    return extra_state


def _values(folder: Path, files: manifest.Manifest, name: str) -> Any:
    try:
        return state_tree.from_files(lambda file: files.content(folder, file), name)
    except state_tree.StateTreeError as error:
        raise DamagedCheckpointError(f"{folder / name}.json and .safetensors cannot be read ({error})") from error


def _has_optimizer(metadata: Metadata) -> bool:
    return any(name.startswith("optimizer.") for name in metadata.state_dict_metadata)


def _saved(metadata: Metadata, plain: dict[str, Any]) -> dict[str, Any]:
    """The model's names in the checkpoint, and what is there: an entry of the metadata, or a plain value."""
    prefix = "model."
    entries = metadata.state_dict_metadata.items()
    return {name[len(prefix) :]: entry for name, entry in entries if name.startswith(prefix)} | plain


def _in_all(names: list[str], group: dist.ProcessGroup | None) -> list[str]:
    """The names that are in the list of every rank. A collective."""
    first, *others = gather(names, group)
    return [name for name in first if all(name in set(other) for other in others)]


def _check_kinds(chosen: dict[str, Any], saved: dict[str, Any]) -> None:
    """Shapes and dtypes must be the saved ones: what is loaded is bitwise what was saved."""
    for name, value in chosen.items():
        entry = saved[name]
        if not isinstance(value, torch.Tensor):
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{name} is no tensor in the checkpoint and a tensor in the model")
        if value.is_meta:
            raise CheckpointError(f"{name} of the model is on the meta device: call to_empty on the model first")
        there, here = list(entry.size), list(value.size())
        if there != here:
            raise CheckpointError(f"{name} is {there} in the checkpoint and {here} in the model")
        there, here = entry.properties.dtype, value.dtype
        if there != here:
            raise CheckpointError(f"{name} is {there} in the checkpoint and {here} in the model")
