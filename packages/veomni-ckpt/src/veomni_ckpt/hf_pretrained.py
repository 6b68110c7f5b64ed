"""Hugging Face safetensors into a model that is already sharded: a rank reads only what it holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from veomni_ckpt.agreement import agree, is_distributed
from veomni_ckpt.checkpoint import Checkpoint
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.lazy_tensors import Box, LazyTensor, box_sizes, row_blocks, whole_box
from veomni_ckpt.local_pieces import copy_common, local_pieces
from veomni_ckpt.names import is_fsdp1, named_tensors, reshard, some, unwrap
from veomni_ckpt.open_checkpoint import open_checkpoint
from veomni_ckpt.safetensors_files import STEMS, file_names, index_name
from veomni_ckpt.stored_tensors import stored_tensors
from veomni_ckpt.transformers_names import (
    convert_on_load,
    is_from_transformers,
    restore_buffers,
    without_expected,
)

_SENT = 64 * 2**20  # bytes of a broadcast


@dataclass(frozen=True)
class LoadReport:
    """What was not loaded.

    Attributes:
        missing: names of the model's tensors that the folder does not have; they keep their values.
        unexpected: names in the folder that the model has no place for.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """The value of each of the model's tensors, a tied one under its first name."""

    values: dict[str, LazyTensor]
    report: LoadReport


@torch.no_grad()
def load_pretrained(
    model: nn.Module,
    hf_folder: str | Path,
    *,
    strict: bool = True,
    broadcast_from_rank0: bool = False,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Fill a model's parameters and persistent buffers from the safetensors of a Hugging Face folder.

    A sharded parameter (DTensor: FSDP2, HSDP, tensor and expert parallel) takes its own part of the file's tensor, read
    by byte ranges, a plain one the whole; values are cast to the parameter's dtype. For a tensor with several names
    (tied weights) one of them in the folder is enough. A model of transformers takes names and weights as
    `from_pretrained` does: keys that were renamed, experts that lie in the folder one by one.

    Without sharding nothing is communicated, so that a single rank may call it; on a sharded or DDP model all ranks
    call it, and all raise if one fails.

    Args:
        model: FSDP1: load before wrapping. What is on the meta device gets its memory here; buffers that are in no
            file (rotary frequencies) are then made by transformers' own rules.
        hf_folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names, or those
            of diffusers.
        strict: False: names that do not fit are a warning; shapes that do not are an error always.
        broadcast_from_rank0: only rank 0 reads, and sends to all (of the default process group); the others need no
            folder.
        device: where what is on the meta device gets its memory; None: a sharded model's own, else the CPU.

    Returns:
        What is missing and unexpected, without what the model's class says is nothing to report.

    Raises:
        CheckpointError: names or shapes that differ, unreadable files, or a model wrapped in FSDP1.
    """
    folder = Path(hf_folder)
    if is_fsdp1(model):
        raise CheckpointError("the model is wrapped in FSDP1, whose parameters are flattened: load it before wrapping")
    reshard(model)
    all_tensors = [tensor for _, tensor in named_tensors(model)]
    is_sharded = any(isinstance(tensor, DTensor) for tensor in all_tensors)
    together = is_distributed() and (is_sharded or broadcast_from_rank0 or isinstance(model, DistributedDataParallel))
    failure: Exception | None = None
    report = LoadReport()
    try:
        if broadcast_from_rank0 and is_distributed():
            report = _broadcast(model, folder, strict, device)
        else:
            report = _read(model, folder, strict, device)
    except Exception as error:
        failure = error
    if together:
        agree(failure)
    elif failure is not None:
        raise failure
    return report


def _read(model: nn.Module, folder: Path, strict: bool, device: torch.device | str | None) -> LoadReport:
    with _open(folder) as checkpoint:
        plan = _plan(model, stored_tensors(checkpoint), folder, strict)
        with _memory(model, device) as tensors:
            for name, value in plan.values.items():
                for box, piece in local_pieces(tensors[name]):
                    value.fetch(box, piece)
    return plan.report


def _broadcast(model: nn.Module, folder: Path, strict: bool, device: torch.device | str | None) -> LoadReport:
    """Rank 0 reads each tensor in blocks of rows; every rank gets all of it, and keeps what it holds."""
    is_first = dist.get_rank() == 0
    failure: Exception | None = None
    with ExitStack() as stack:
        stored: dict[str, LazyTensor] = {}
        if is_first:
            try:
                stored = stored_tensors(stack.enter_context(_open(folder)))
            except Exception as error:
                failure = error
        agree(failure)
        table: list[Any] = [{name: (list(value.shape), value.dtype) for name, value in stored.items()}]
        dist.broadcast_object_list(table, src=0)
        if not is_first:
            stored = {name: LazyTensor(shape, dtype, _nowhere) for name, (shape, dtype) in table[0].items()}
        plan = _plan(model, stored, folder, strict)
        with _memory(model, device) as tensors:
            agree(None)  # from here on every rank takes part in every broadcast
            for name, value in plan.values.items():
                pieces = local_pieces(tensors[name])
                box = whole_box(value.shape)
                for block in row_blocks(box, value.numel() * value.dtype.itemsize, _SENT):
                    sent = torch.empty(box_sizes(block), dtype=value.dtype, device=tensors[name].device)
                    if is_first and failure is None:
                        try:
                            value.fetch(block, sent)
                        except Exception as error:  # told at the end: the other ranks wait for the rest
                            failure = error
                    dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)
                    for own, piece in pieces:
                        copy_common(sent, block, piece, own)
    if failure is not None:
        raise failure
    return plan.report


def _nowhere(box: Box, out: torch.Tensor) -> None:
    raise AssertionError("only rank 0 reads")


def _open(folder: Path) -> Checkpoint:
    """The folder's weights: one whole file if it is there, as transformers chooses, or what the index names."""
    for stem in STEMS:
        whole = folder / file_names(1, stem)[0]
        if whole.is_file():
            return open_checkpoint(whole)
        if (folder / index_name(stem)).is_file():
            return open_checkpoint(folder)
    raise CheckpointError(f"{folder} has neither {file_names(1)[0]} nor {index_name()}: it is no Hugging Face folder")


def _plan(model: nn.Module, stored: dict[str, LazyTensor], folder: Path, strict: bool) -> _Plan:
    wanted = dict(named_tensors(model))
    converted = convert_on_load(model, wanted, stored)
    declared: dict[str, str] = getattr(unwrap(model), "all_tied_weights_keys", None) or {}
    values: dict[str, LazyTensor] = {}
    missing: set[str] = set()
    faults = []
    for names in _names_of_each(wanted):
        found = [name for name in names if name in converted.values]
        if not found:
            missing.add(names[0])
            continue
        # of a tied tensor that is there under several names, the one that transformers says the others are tied to
        name = next((name for name in found if name not in declared), found[0])
        value = values[names[0]] = converted.values[name]
        if value.shape != wanted[name].shape:
            made = converted.origins[name]
            of = "" if made == [name] else f", made of {made[0]}" + (f" and {len(made) - 1} more" if made[1:] else "")
            faults.append(f"{name} is {list(value.shape)} in the file{of}, and {list(wanted[name].shape)} in the model")
    if faults:
        raise CheckpointError(f"{folder} does not fit the model: {some(faults)}")
    missing, unexpected = without_expected(model, missing, set(converted.unexpected))
    report = LoadReport([name for name in wanted if name in missing], sorted(unexpected))
    faults = [f"it has no {some(report.missing)}, which the model has"] if report.missing else []
    if report.unexpected:
        faults.append(f"it has {some(report.unexpected)}, which the model has not")
    if faults and strict:
        raise CheckpointError(f"{folder} does not fit the model: {'; '.join(faults)}")
    if faults:
        warnings.warn(f"{folder}: {'; '.join(faults)}", stacklevel=5)
    if empty := [name for name in report.missing if wanted[name].is_meta]:
        raise CheckpointError(f"{folder} has no {some(empty)}, which the model has on the meta device: give it values")
    return _Plan(values, report)


def _names_of_each(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """The names of each tensor: several of one that is tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


@contextmanager
def _memory(model: nn.Module, device: torch.device | str | None) -> Iterator[dict[str, torch.Tensor]]:
    """The model's parameters and persistent buffers by name, with memory for what was on the meta device.

    On leaving, when they have their values, buffers that are in no file get theirs.
    """
    every = [*model.named_parameters(), *model.named_buffers()]
    if not any(tensor.is_meta for _, tensor in every):
        yield dict(named_tensors(model))
        return
    saved = {id(tensor) for _, tensor in named_tensors(model)}
    computed = [name for name, tensor in every if tensor.is_meta and id(tensor) not in saved]
    if computed and not is_from_transformers(unwrap(model)):
        raise CheckpointError(f"{some(computed)} of the model: on the meta device, and in no file; call to_empty first")
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device if device is not None else _device_of(model))
    for (first, own), *others in owners.values():  # to_empty gives each owner of a tied parameter one of its own
        for module, name in others:
            module._parameters[name] = first._parameters[own]
    yield dict(named_tensors(model))
    if computed:
        restore_buffers(model)


def _device_of(model: nn.Module) -> torch.device:
    kinds = [tensor.device_mesh.device_type for tensor in model.parameters() if isinstance(tensor, DTensor)]
    return torch.device(kinds[0] if kinds else "cpu")
