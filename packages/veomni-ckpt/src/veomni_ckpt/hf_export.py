"""A live, sharded model as a Hugging Face folder, gathered tensor by tensor."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from veomni_ckpt.agreement import agree, is_distributed
from veomni_ckpt.durable import hidden_beside, publish, remove, restore_replaced
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.names import is_fsdp1, named_tensors, reshard, unwrap

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@torch.no_grad()
def export_hf(
    model: nn.Module,
    hf_folder: str | Path,
    *,
    assets: Sequence[Any] = (),
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as safetensors, with its config, in a folder that `from_pretrained` loads; diffusers' too.

    A collective: all ranks gather each tensor in turn, rank 0 keeps those of one file and writes it. The folder appears
    under its name when complete; an older Hugging Face folder of that name is replaced then and not before.

    Args:
        model: plain, DDP, FSDP1, FSDP2 or HSDP, with or without transformers' `config` and `generation_config`.
        hf_folder: a name that is free, or an older Hugging Face folder.
        assets: what else belongs in the folder: objects with `save_pretrained(folder)` (tokenizer, processor), or
            paths of files to copy.
        max_shard_size: bytes, or a string such as "5GB" or "200MB"; a larger tensor gets a file of its own.
        dtype: floating-point tensors are cast to it; None keeps them as they are.

    Raises:
        CheckpointError: on every rank, with the folder's name and the reason; an older folder is untouched.
    """
    final = Path(hf_folder)
    context = f"{final} was not exported: "
    partial = hidden_beside(final, "partial")
    is_first = not is_distributed() or dist.get_rank() == 0
    reshard(model)
    failure: Exception | None = None
    files: list[list[str]] = []
    state: dict[str, Any] = {}
    try:
        state = _distinct_tensors(model)
        files = _plan_files(state, _parse_size(max_shard_size), dtype)
        if is_first:
            _prepare(final, partial)
    except Exception as error:
        failure = error
    agree(failure, context=context)

    count = len(files)
    stem = "diffusion_pytorch_model" if is_of_diffusers(model) else "model"
    file_names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        file_names = [f"{stem}.safetensors"]
    for file_name, names in zip(file_names, files, strict=True):
        kept: dict[str, torch.Tensor] = {}
        for name in names:
            whole = _gather(state[name], is_first)
            if whole is None or failure is not None:
                continue
            try:
                kept[name] = _for_file(whole, dtype)
            except Exception as error:
                failure = error  # told after the file: the other ranks are in the next gather
        try:
            if is_first and failure is None:
                save_file(kept, partial / file_name, metadata={"format": "pt"})
        except Exception as error:
            failure = error
        if failure is not None and is_first:
            shutil.rmtree(partial, ignore_errors=True)
        agree(failure, context=context)

    try:
        if is_first:
            if count > 1:
                _write_index(partial / f"{stem}.safetensors.index.json", file_names, files, state, dtype)
            _write_configs(model, partial, state, dtype)
            for asset in assets:
                _write_asset(asset, partial)
            publish(partial, final)
    except Exception as error:
        failure = error
        shutil.rmtree(partial, ignore_errors=True)
    agree(failure, context=context)


def _distinct_tensors(model: nn.Module) -> dict[str, Any]:
    """The state dict by original names, each tied tensor once."""
    state = dict(get_model_state_dict(model))
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}: a safetensors file holds tensors only")
    # what transformers says is tied: {the name that is left out: the name that stays}
    declared: dict[str, str] = getattr(unwrap(model), "all_tied_weights_keys", None) or {}
    if is_fsdp1(model):
        # flattening has ended the identity of tied parameters, so that only the declaration is left
        tied = {name for name, source in declared.items() if name in state and source in state}
    else:
        names_of: dict[int, list[str]] = {}
        for name, tensor in named_tensors(model):
            if name in state:
                names_of.setdefault(id(tensor), []).append(name)
        tied = set()
        for names in names_of.values():
            stays = next((name for name in names if name not in declared), names[0])
            tied |= set(names) - {stays}
    return {name: value for name, value in state.items() if name not in tied}


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", str(size).upper())
    number = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if number < 1:
        raise CheckpointError(f'max_shard_size={size!r} is no size: give bytes, or a string such as "5GB"')
    return number


def _bytes_of(tensor: torch.Tensor, dtype: torch.dtype | None) -> int:
    cast = dtype is not None and tensor.dtype.is_floating_point
    return math.prod(tensor.size()) * (dtype if cast else tensor.dtype).itemsize  # type: ignore[union-attr]


def _plan_files(state: dict[str, Any], limit: int, dtype: torch.dtype | None) -> list[list[str]]:
    """Names of the tensors of each file: in the model's order, a new file when the next would pass the limit."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        size = _bytes_of(tensor, dtype)
        if files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def _prepare(final: Path, partial: Path) -> None:
    restore_replaced(final)
    if final.exists() and not final.is_dir():
        raise CheckpointError("there is a file of that name")
    if final.is_dir() and any(final.iterdir()) and not (final / "config.json").exists():
        weights = list(final.glob("*.safetensors"))
        if not weights:
            raise CheckpointError("the folder exists and is not a Hugging Face folder: give a name that is free")
    remove(partial)
    partial.mkdir(parents=True)


def _gather(value: torch.Tensor, is_first: bool) -> torch.Tensor | None:
    """The whole tensor on rank 0, None elsewhere; all ranks take part where it is sharded."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    elif isinstance(value, ShardedTensor):  # FSDP1 without a device mesh
        device = value.local_shards()[0].tensor.device if value.local_shards() else torch.device("cpu")
        out = torch.empty(value.size(), dtype=value.dtype, device=device) if is_first else None
        value.gather(dst=0, out=out)
        return out
    return value if is_first else None


def _for_file(whole: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is not None and whole.is_floating_point():
        whole = whole.to(dtype)
    # safetensors refuses tensors that share memory, such as views of one buffer
    return whole.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def is_of_diffusers(model: nn.Module) -> bool:
    """Whether it is a model of diffusers, whose files have other names and whose config is written otherwise."""
    return hasattr(unwrap(model), "save_config")


def _write_index(
    path: Path, file_names: list[str], files: list[list[str]], state: dict[str, Any], dtype: torch.dtype | None
) -> None:
    index = {
        "metadata": {"total_size": sum(_bytes_of(tensor, dtype) for tensor in state.values())},
        "weight_map": {name: file for file, names in zip(file_names, files, strict=True) for name in names},
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configs(model: nn.Module, folder: Path, state: dict[str, Any], dtype: torch.dtype | None) -> None:
    inner = unwrap(model)
    config: Any = getattr(inner, "config", None)
    # fully_shard gives the model a class of its own, made of FSDPModule and the author's class
    author_class = next(cls for cls in type(inner).__mro__ if not issubclass(cls, FSDPModule))
    if is_of_diffusers(model):
        document = json.loads(inner.to_json_string()) | {"_class_name": author_class.__name__}
        (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    elif hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [author_class.__name__]
        floating = [tensor.dtype for tensor in state.values() if tensor.dtype.is_floating_point]
        if floating:
            config.dtype = dtype or floating[0]
        config.save_pretrained(folder)
    generation_config: Any = getattr(inner, "generation_config", None)
    if hasattr(generation_config, "save_pretrained"):
        generation_config.save_pretrained(folder)


def _write_asset(asset: Any, folder: Path) -> None:
    if hasattr(asset, "save_pretrained"):
        asset.save_pretrained(folder)
    elif isinstance(asset, str | Path) and Path(asset).is_file():
        shutil.copy(asset, folder)
    else:
        raise CheckpointError(f"the asset {asset!r} is neither a file nor an object with save_pretrained")
