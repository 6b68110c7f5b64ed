"""Hugging Face safetensors into a model that is already sharded: a rank copies only what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from veomni_ckpt.agreement import agree, is_distributed
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.names import is_fsdp1, named_tensors, reshard, some


@torch.no_grad()
def load_pretrained(model: nn.Module, hf_folder: str | Path) -> None:
    """Fill a model's parameters and persistent buffers from `model.safetensors` or an index and its shards.

    A sharded parameter (DTensor: FSDP2, HSDP, tensor and expert parallel) takes its own slice of the file's tensor, a
    plain one the whole; values are cast to the parameter's dtype. For a tensor with several names (tied weights) one of
    them in the file is enough. Without sharding nothing is communicated, so that a single rank may call it; on a
    sharded or DDP model all ranks call it, and all raise if one fails.

    Args:
        model: in memory, not on the meta device. FSDP1: load before wrapping.
        hf_folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names.

    Raises:
        CheckpointError: names or shapes that differ, unreadable files, a model on the meta device or wrapped in FSDP1.
    """
    folder = Path(hf_folder)
    if is_fsdp1(model):
        raise CheckpointError("the model is wrapped in FSDP1, whose parameters are flattened: load it before wrapping")
    reshard(model)
    tensors = dict(named_tensors(model))
    failure: Exception | None = None
    try:
        _copy_files(tensors, folder)
    except Exception as error:
        failure = error
    wrapped = isinstance(model, DistributedDataParallel) or any(isinstance(t, DTensor) for t in tensors.values())
    if wrapped and is_distributed():
        agree(failure)
    elif failure is not None:
        raise failure


def _copy_files(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    if on_meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise CheckpointError(f"{some(on_meta)} of the model on the meta device: call to_empty on the model first")
    files = _files_of_names(folder)
    _check_names(tensors, set(files), folder)
    names_in_file: dict[Path, list[str]] = {}
    for name, path in files.items():
        names_in_file.setdefault(path, []).append(name)
    for path, names in names_in_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                _check_shapes(tensors, file, names, path)
                for name in names:
                    _copy_own_part(tensors[name], file, name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error


def _files_of_names(folder: Path) -> dict[str, Path]:
    """Name of each tensor -> the file that holds it."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not whole.is_file() and not index.is_file():  # diffusers has names of its own
        of_diffusers = folder / f"diffusion_pytorch_{whole.name}", folder / f"diffusion_pytorch_{index.name}"
        if any(path.is_file() for path in of_diffusers):
            whole, index = of_diffusers
    if whole.is_file():
        try:
            with safe_open(whole, framework="pt") as file:
                return dict.fromkeys(file.keys(), whole)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{whole} cannot be read ({error})") from error
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {whole.name} nor {index.name}: it is no Hugging Face folder")
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        for file_name in weight_map.values():
            if file_name != Path(file_name).name:
                raise CheckpointError(f"{index} names {file_name!r}, which is not in the folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read ({type(error).__name__}: {error})") from error
    return {name: folder / file_name for name, file_name in weight_map.items()}


def _check_names(tensors: dict[str, torch.Tensor], in_files: set[str], folder: Path) -> None:
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    missing = [names[0] for names in names_of.values() if not in_files.intersection(names)]
    unexpected = sorted(in_files - tensors.keys())
    faults = []
    if missing:
        faults.append(f"it has no {some(missing)}, which the model has")
    if unexpected:
        faults.append(f"it has {some(unexpected)}, which the model has not")
    if faults:
        raise CheckpointError(f"{folder} does not fit the model: {'; '.join(faults)}")


def _check_shapes(tensors: dict[str, torch.Tensor], file: Any, names: list[str], path: Path) -> None:
    held = set(file.keys())
    if absent := [name for name in names if name not in held]:
        raise CheckpointError(f"{path} does not hold {some(absent)}, which the index says it does")
    faults = []
    for name in names:
        shape, wanted = list(file.get_slice(name).get_shape()), list(tensors[name].size())
        if shape != wanted:
            faults.append(f"{name} is {shape} in the file and {wanted} in the model")
    if faults:
        raise CheckpointError(f"{path} does not fit the model: {some(faults)}")


def _copy_own_part(tensor: torch.Tensor, file: Any, name: str) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(file.get_tensor(name))
        return
    local = tensor.to_local()
    if local.numel() == 0:
        return
    # the one box of the whole tensor that this rank holds, as DCP asks for it
    (box,) = tensor.__create_chunk_list__()
    if tensor.dim() == 0:
        local.copy_(file.get_tensor(name))
    else:
        part = tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes, strict=True))
        local.copy_(file.get_slice(name)[part])
