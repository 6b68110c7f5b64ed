"""A live, sharded model as a Hugging Face folder, gathered block by block."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from veomni_ckpt.agreement import agree, is_distributed
from veomni_ckpt.dtypes import DTYPES, Dtype
from veomni_ckpt.durable import hidden_beside, publish, remove, restore_replaced
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.lazy_tensors import Box, LazyTensor, box_sizes, row_blocks, whole_box
from veomni_ckpt.local_pieces import intersection, local_pieces, within
from veomni_ckpt.names import is_fsdp1, named_tensors, reshard, unwrap
from veomni_ckpt.output_files import parse_size
from veomni_ckpt.safetensors_files import STEMS, file_names, make_header, write_index
from veomni_ckpt.transformers_names import author_class, convert_on_save

_BLOCK = 32 * 2**20  # bytes of a tensor that rank 0 holds at a time


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

    A collective: rank 0 gets each tensor in blocks of rows from the ranks that hold them, and writes each at once, so
    that no rank ever holds more of the model than its own part and one block. A model of transformers gets the names
    that `save_pretrained` gives it: experts that are one tensor in the model lie one by one. The folder appears under
    its name when complete; an older Hugging Face folder of that name is replaced then and not before.

    Args:
        model: plain, DDP, FSDP1, FSDP2, HSDP, or of any DTensors (expert, tensor parallel), with or without
            transformers' `config` and `generation_config`.
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
    stem = STEMS[_is_of_diffusers(model)]
    reshard(model)
    failure: Exception | None = None
    files: list[_File] = []
    saved: dict[str, LazyTensor] = {}
    try:
        limit = parse_size(max_shard_size)
        state = _distinct_tensors(model)
        if is_first:
            _prepare(final, partial)
    except Exception as error:
        failure = error
    agree(failure, context=context)

    holders = _holders(state)
    try:
        saved = convert_on_save(
            model, {name: _gathered(tensor, holders.get(name, {})) for name, tensor in state.items()}
        )
        files = _plan_files(saved, limit, dtype, stem)
    except Exception as error:
        failure = error
    agree(failure, context=context)

    for file in files:
        try:
            _write_file(partial, file, saved, dtype, is_first)
        except Exception as error:
            failure = error
            shutil.rmtree(partial, ignore_errors=True)
        agree(failure, context=context)

    try:
        if is_first:
            if len(files) > 1:
                total = sum(file.nbytes for file in files)
                write_index(partial, total, {name: file.name for file in files for name in file.begins}, stem)
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


def _holders(state: dict[str, Any]) -> dict[str, dict[int, list[Box]]]:
    """Of each sharded tensor, the ranks that hold different boxes of it; of replicas the lowest rank. A collective."""
    own = {
        name: [box for box, piece in local_pieces(tensor) if piece.numel()]
        for name, tensor in state.items()
        if isinstance(tensor, DTensor | ShardedTensor)
    }
    every = [own]
    if is_distributed():
        every = [{}] * dist.get_world_size()
        dist.all_gather_object(every, own)
    holders: dict[str, dict[int, list[Box]]] = {}
    for name in own:
        seen: list[list[Box]] = []
        holders[name] = {}
        for rank, boxes_of in enumerate(every):
            if boxes_of[name] and boxes_of[name] not in seen:
                seen.append(boxes_of[name])
                holders[name][rank] = boxes_of[name]
    return holders


def _gathered(tensor: Any, holders: dict[int, list[Box]]) -> LazyTensor:
    """The whole tensor on rank 0, of which any box can be fetched; all ranks take part, the others fetch to nowhere."""
    rank = dist.get_rank() if is_distributed() else 0
    pieces = {box: piece for box, piece in local_pieces(tensor) if piece.numel()}
    sources = holders or {0: list(pieces)}  # what is not sharded is whole on every rank

    def fetch(box: Box, out: torch.Tensor) -> None:
        for source, boxes in sources.items():
            if rank not in (0, source):
                continue
            for held in boxes:
                common = intersection(box, held)
                if common is None:
                    continue
                if source == 0:
                    if rank == 0:
                        out[within(common, box)] = pieces[held][within(common, held)].to(out.device)
                elif rank == source:
                    dist.send(_raw(pieces[held][within(common, held)].contiguous()), 0)
                else:
                    part = torch.empty(box_sizes(common), dtype=tensor.dtype, device=_device_of(tensor))
                    dist.recv(_raw(part), source)
                    out[within(common, box)] = part.to(out.device)

    return LazyTensor(tensor.size(), tensor.dtype, fetch)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _device_of(tensor: Any) -> torch.device:
    """Where the pieces of a sharded tensor are, on a rank that has none too."""
    if isinstance(tensor, ShardedTensor):
        shards = tensor.local_shards()
        return shards[0].tensor.device if shards else torch.device("cpu")
    device: torch.device = tensor.to_local().device
    return device


@dataclass(frozen=True)
class _File:
    """A file to be written: its first bytes, and where each tensor begins in it, in that order."""

    name: str
    head: bytes
    begins: dict[str, int]
    nbytes: int


def _plan_files(saved: dict[str, LazyTensor], limit: int, dtype: torch.dtype | None, stem: str) -> list[_File]:
    """Files of the tensors in the model's order; a new one where the next tensor would pass the limit."""
    groups: list[list[tuple[str, Dtype, tuple[int, ...]]]] = [[]]
    filled = [0]
    for name, tensor in saved.items():
        kind = DTYPES.get(str(_saved_dtype(tensor, dtype)).removeprefix("torch."))
        if kind is None or kind.code is None:
            raise CheckpointError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold")
        size = math.prod(tensor.shape) * kind.itemsize
        if groups[-1] and filled[-1] + size > limit:
            groups.append([])
            filled.append(0)
        groups[-1].append((name, kind, tuple(tensor.shape)))
        filled[-1] += size
    files = []
    for file_name, group, nbytes in zip(file_names(len(groups), stem), groups, filled, strict=True):
        head, begins = make_header(group)
        files.append(_File(file_name, head, dict(sorted(begins.items(), key=lambda item: item[1])), nbytes))
    return files


def _saved_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype


def _write_file(
    folder: Path, file: _File, saved: dict[str, LazyTensor], dtype: torch.dtype | None, is_first: bool
) -> None:
    """All ranks fetch every block of rows of every tensor; rank 0 writes it. What fails is raised at the end."""
    failure: Exception | None = None
    with ExitStack() as stack:
        stream: Any = None
        try:
            stream = stack.enter_context((folder / file.name).open("wb")) if is_first else None
            if stream is not None:
                stream.write(file.head)
        except OSError as error:
            failure = error
        for name, begin in file.begins.items():
            tensor = saved[name]
            at = begin
            for block in row_blocks(whole_box(tensor.shape), tensor.numel() * tensor.dtype.itemsize, _BLOCK):
                part = torch.empty(box_sizes(block), dtype=tensor.dtype, device="cpu" if is_first else "meta")
                tensor.fetch(block, part)
                if stream is None or failure is not None:
                    continue
                try:
                    data = _raw(part.to(_saved_dtype(tensor, dtype))).numpy()
                    stream.seek(at)
                    stream.write(data)
                    at += len(data)
                except OSError as error:  # told after the file: the other ranks are sending
                    failure = error
    if failure is not None:
        raise failure


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


def _is_of_diffusers(model: nn.Module) -> bool:
    """Whether it is a model of diffusers, whose files have other names and whose config is written otherwise."""
    return hasattr(unwrap(model), "save_config")


def _write_configs(model: nn.Module, folder: Path, state: dict[str, Any], dtype: torch.dtype | None) -> None:
    inner = unwrap(model)
    config: Any = getattr(inner, "config", None)
    if _is_of_diffusers(inner):
        document = json.loads(inner.to_json_string()) | {"_class_name": author_class(inner).__name__}
        (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    elif hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [author_class(inner).__name__]
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
