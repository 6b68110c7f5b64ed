"""Finding out what a path holds: a checkpoint of any format, whose tables of contents are read and nothing else.

A DCP folder (`.metadata` and `.distcp` files, in torch.save's or safetensors' serialization), one whose ranks wrote a
`__N.metadata` each, a Hugging Face folder (safetensors, with or without an index), the shards that torch's
HuggingFaceStorageWriter leaves, and a single safetensors file.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from veomni_ckpt.checkpoint import Checkpoint, Piece, Tensor
from veomni_ckpt.dcp_checkpoint import open_dcp
from veomni_ckpt.dtypes import Dtype
from veomni_ckpt.errors import CheckpointError, DamagedCheckpointError
from veomni_ckpt.safetensors_files import STEMS, Header, index_name, read_header
from veomni_ckpt.tiling import Box, fault_of_tiling

Shape = tuple[int, ...]

_RANK_METADATA = re.compile(r"__(\d+)\.metadata")


def open_checkpoint(path: str | Path, scratch_folder: Path | None = None) -> Checkpoint:
    """Open a checkpoint of any format; only its tables of contents are read.

    Args:
        path: a folder, or a safetensors file.
        scratch_folder: where temporary files are made if some are needed; None: where the system keeps such.

    Raises:
        CheckpointError: nothing is there, or nothing that is known.
        DamagedCheckpointError: naming file, tensor and what is wrong.
    """
    path = Path(path)
    try:
        checkpoint = _open(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    checkpoint.scratch_folder = scratch_folder
    return checkpoint


def _open(path: Path) -> Checkpoint:
    if path.is_file():
        return _open_safetensors(path, [path], "safetensors file")
    if not path.is_dir():
        raise CheckpointError(f"there is no {path}")
    names = sorted(entry.name for entry in os.scandir(path))
    if ".metadata" in names:
        return open_dcp(path, [path / ".metadata"], "DCP folder")
    if ranks := sorted((name for name in names if _RANK_METADATA.fullmatch(name)), key=lambda name: int(name[2:-9])):
        return open_dcp(path, [path / name for name in ranks], "DCP folder with metadata of each rank")
    files = [path / name for name in names if name.endswith(".safetensors")]
    if not files and not {index_name(stem) for stem in STEMS}.intersection(names):
        steps = sorted((int(name[12:]), name) for name in names if re.fullmatch(r"global_step_\d{1,18}", name))
        hint = f": give one of its checkpoints, such as {path / steps[-1][1]}" if steps else ""
        raise CheckpointError(f"{path} has no .metadata file and no safetensors: it is no checkpoint{hint}")
    if files and all(re.fullmatch(r"shard-\d+-model-.*", file.name) for file in files):
        return _open_sharded_safetensors(path, files)
    weight_map = _weight_map(path)
    if weight_map:  # what lies beside the files that it names is not the model's
        files = [path / name for name in sorted(set(weight_map.values()))]
    checkpoint = _open_safetensors(path, files, "Hugging Face folder")
    for name, file in weight_map.items():
        if name not in checkpoint.tensors:
            raise DamagedCheckpointError(f"{path / file} does not hold {name[:200]}, which the index says it does")
    return checkpoint


def _open_safetensors(path: Path, files: list[Path], kind: str) -> Checkpoint:
    checkpoint = Checkpoint(path, kind, {})
    for number, file in enumerate(files):
        header = read_header(file)
        checkpoint.files.append(file)
        checkpoint.sizes.append(file.stat().st_size)
        for name, entry in header.tensors.items():
            if name in checkpoint.tensors:
                raise DamagedCheckpointError(f"{file} holds {name}, which another file of the folder holds too")
            checkpoint.tensors[name] = Tensor(name, entry.dtype, entry.shape)
            empty = entry.nbytes == 0
            checkpoint._pieces[name] = (
                [] if empty else [Piece((0,) * len(entry.shape), entry.shape, number, entry.begin)]
            )
    return checkpoint


def _weight_map(path: Path) -> dict[str, str]:
    """Name of each tensor -> name of its file, as the index of a folder says; empty if there is none."""
    index = next((path / index_name(stem) for stem in STEMS if (path / index_name(stem)).is_file()), None)
    if index is None:
        return {}
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        outside = [
            name for name in weight_map.values() if name != Path(name).name or name[:1] in ("", ".") or "\0" in name
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{index} cannot be read: it has no table `weight_map`") from error
    if outside:
        raise DamagedCheckpointError(f"{index} names {outside[0][:200]!r}, which is not in the folder")
    return weight_map


def _open_sharded_safetensors(path: Path, files: list[Path]) -> Checkpoint:
    """What HuggingFaceStorageWriter leaves: each file says at which offsets of the tensors its parts begin."""
    checkpoint = Checkpoint(path, "safetensors shards of torch's HuggingFaceStorageWriter", {})
    boxes: dict[str, dict[Box, Piece]] = {}
    dtypes: dict[str, Dtype] = {}
    for number, file in enumerate(files):
        header = read_header(file)
        checkpoint.files.append(file)
        checkpoint.sizes.append(file.stat().st_size)
        for name, entry in header.tensors.items():
            offsets = _saved_offsets(file, header, name, len(entry.shape))
            if dtypes.setdefault(name, entry.dtype) != entry.dtype:
                raise DamagedCheckpointError(f"{file} holds {name} in another element type than another file does")
            boxes.setdefault(name, {})[offsets, entry.shape] = Piece(offsets, entry.shape, number, entry.begin)
    for name, pieces in boxes.items():
        ends = [[offset + size for offset, size in zip(*box, strict=True)] for box in pieces]
        if len({len(end) for end in ends}) > 1:
            raise DamagedCheckpointError(f"{path} holds parts of {name} that have different dimensions")
        shape = tuple(max(column) for column in zip(*ends, strict=True))
        if fault := fault_of_tiling(shape, list(pieces)):
            raise DamagedCheckpointError(f"{path} does not hold all of {name}: {fault}")
        checkpoint.tensors[name] = Tensor(name, dtypes[name], shape)
        checkpoint._pieces[name] = [piece for piece in pieces.values() if 0 not in piece.sizes]
    return checkpoint


def _saved_offsets(file: Path, header: Header, name: str, dimensions: int) -> Shape:
    try:
        offsets = json.loads(header.metadata["DCP_SHARDING_INFO"])[name]["saved_offsets"]
    except (ValueError, KeyError, TypeError, RecursionError):
        offsets = None
    fits = isinstance(offsets, list) and len(offsets) == dimensions
    if not fits or not all(type(offset) is int and 0 <= offset < 2**62 for offset in offsets):
        raise DamagedCheckpointError(f"{file} does not say at which offsets its part of {name[:200]} begins")
    return tuple(offsets)
