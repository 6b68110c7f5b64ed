"""A Hugging Face folder as a folder of torch's distributed checkpoint."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veomni_ckpt.checkpoint import Checkpoint, Tensor
from veomni_ckpt.durable import hidden_beside, publish, remove
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.key_map import model_names
from veomni_ckpt.open_checkpoint import open_checkpoint
from veomni_ckpt.tensor_reader import TensorReader

_FILE_BYTES = 5 * 10**9


def hf_to_dcp(
    src: str | Path,
    dst: str | Path,
    *,
    root: str = "model",
    dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write safetensors as a DCP folder, which `torch.distributed.checkpoint.load` loads into any layout.

    Tensors are read, and written, one after the other (`dcp.save` would hold all of them in memory). The folder appears
    under its name when all of it is on the disk.

    Args:
        src: a Hugging Face folder or a safetensors file; any other checkpoint's model is taken too.
        dst: a name that is free.
        root: key that the model gets in the state dict, so that `dcp.load({root: model.state_dict()}, ...)` finds it:
            CheckpointManager's "model"; "app.model" for one within another; "" for none.
        dtype: a torch.dtype or its name; floating-point tensors are converted to it.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: naming the file or tensor; nothing is left behind.
    """
    dst = Path(dst)
    if dst.exists():
        raise CheckpointError(f"{dst} exists: give a name that is free")
    target = _torch_dtype(dtype)
    partial = hidden_beside(dst, "partial")
    with open_checkpoint(src) as checkpoint:
        names = model_names(checkpoint)
        for source in names.values():
            checkpoint.pieces(source)
        try:
            remove(partial)
            partial.mkdir(parents=True)
            try:
                _save(checkpoint, names, partial, root, target, progress)
                publish(partial, dst)
            except BaseException:
                remove(partial)
                raise
        except OSError as error:
            raise CheckpointError(f"{dst} was not written ({error.strerror or error})") from error


def _save(
    checkpoint: Checkpoint,
    names: dict[str, str],
    folder: Path,
    root: str,
    dtype: Any,
    progress: Callable[[int, int], None] | None,
) -> None:
    """As `dcp.save` of one process lays it out: each tensor saved by torch.save, one after the other in a file."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    roots = root.split(".") if root else []
    metadata = Metadata({}, {}, {}, StorageMeta())
    total = sum(checkpoint.tensors[source].nbytes for source in names.values())
    done, number = 0, 0
    stream = (folder / "__0_0.distcp").open("wb")
    try:
        for name, source in names.items():
            tensor = _read(checkpoint, checkpoint.tensors[source])
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            if stream.tell() > _FILE_BYTES:
                stream.close()
                number += 1
                stream = (folder / f"__0_{number}.distcp").open("wb")
            offset, begin = torch.Size([0] * tensor.dim()), stream.tell()
            torch.save(tensor, stream)
            key = ".".join([*roots, name])
            chunk = ChunkStorageMetadata(offset, tensor.size())
            properties = TensorProperties.create_from_tensor(tensor)
            metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, tensor.size(), [chunk])
            metadata.planner_data[key] = (*roots, name)
            info = _StorageInfo(f"__0_{number}.distcp", begin, stream.tell() - begin)
            metadata.storage_data[MetadataIndex(key, offset, 0)] = info
            done += checkpoint.tensors[source].nbytes
            if progress is not None:
                progress(done, total)
    finally:
        stream.close()
    with (folder / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _torch_dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    import torch

    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"dtype={str(dtype)!r} is no floating-point type of torch")
    return found


def _read(checkpoint: Checkpoint, tensor: Tensor) -> Any:
    """The whole tensor, in memory of its own."""
    import torch

    data = bytearray(tensor.nbytes)
    TensorReader(checkpoint, tensor).read(0, tensor.nbytes, memoryview(data))
    element = getattr(torch, tensor.dtype.name)
    if not data:
        return torch.empty(tensor.shape, dtype=element)
    return torch.frombuffer(data, dtype=element).reshape(tensor.shape)
