"""Reading the files of torch's distributed checkpoint (DCP) without letting them run anything.

DCP's `.metadata` is a pickle and its readers unpickle it as it is: whoever wrote the file runs code in whoever loads
it. Here it is read by an unpickler that knows only the classes DCP itself writes. Items that are not tensors are
pickles too; they are neither written nor read: `state_tree` keeps what is no tensor.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from veomni_ckpt.errors import DamagedCheckpointError

_DCP_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
# where the checkpoint was once saved; the class moved in Python 3.13
_PATH_CLASSES = {(module, "PosixPath") for module in ("pathlib", "pathlib._local")}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DCP_CLASSES:
            return super().find_class(module, name)
        if (module, name) in _PATH_CLASSES:
            return PurePosixPath
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_metadata(folder: Path) -> Metadata:
    """The table of contents of a DCP folder, from its `.metadata`.

    Raises:
        DamagedCheckpointError: the file is missing, truncated, or asks for anything that DCP does not write.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder} has no .metadata file: it is not a whole DCP checkpoint") from error
    except Exception as error:  # a mangled pickle raises whatever its bytes happen to mean
        raise DamagedCheckpointError(f"{path} cannot be read ({error})") from error
    if not isinstance(metadata, Metadata):
        raise DamagedCheckpointError(f"{path} holds a {type(metadata).__name__} where DCP's Metadata belongs")
    return metadata


def verify_files(folder: Path, metadata: Metadata) -> None:
    """Check that every byte range that the metadata names lies in a file of the folder, and covers every tensor.

    Reads no data: one `stat` per file.

    Raises:
        DamagedCheckpointError: naming the file and what is wrong with it.
    """
    try:
        _verify_files(folder, metadata)
    except (AttributeError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder / '.metadata'} is inconsistent ({error})") from error


def _verify_files(folder: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for item in metadata.storage_data.values():
        if item.relative_path != Path(item.relative_path).name or item.offset < 0 or item.length < 0:
            raise DamagedCheckpointError(
                f"{folder / '.metadata'} names {item.relative_path!r} at {item.offset}, which is not in the folder"
            )
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} is missing")
        if (size := path.stat().st_size) < end:
            raise DamagedCheckpointError(f"{path} is truncated: {size} bytes of {end}")

    stored = {(index.fqn, index.offset) for index in metadata.storage_data}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            absent = [chunk for chunk in entry.chunks if (name, chunk.offsets) not in stored]
            if absent or covered != math.prod(entry.size):
                raise DamagedCheckpointError(f"{folder / '.metadata'} does not say where all of {name} is stored")


class SafeReader(FileSystemReader):
    """DCP's reader of files, with metadata that `read_metadata` has read."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the constructor was given; the file is not read again."""
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata
