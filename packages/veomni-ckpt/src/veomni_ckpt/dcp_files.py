"""The files of torch's distributed checkpoint (DCP) as its own readers need them, without letting them run anything.

DCP's `.metadata` is a pickle and its readers unpickle it as it is: whoever wrote the file runs code in whoever loads
it. Here it is read by `metadata_reader`, and what that found is handed over as torch's classes. Items that are not
tensors are pickles too; they are neither written nor read: `state_tree` keeps what is no tensor.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from veomni_ckpt.errors import DamagedCheckpointError
from veomni_ckpt.metadata_reader import DcpMetadata, read_dcp_metadata


def read_metadata(folder: Path) -> Metadata:
    """The table of contents of a DCP folder, from its `.metadata`.

    Raises:
        DamagedCheckpointError: the file is missing, truncated, or asks for anything that DCP does not write.
    """
    return _as_torch(read_dcp_metadata(folder / ".metadata"))


def _as_torch(found: DcpMetadata) -> Metadata:
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, entry in found.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in entry.chunks]
        dtype = getattr(torch, entry.dtype.name)
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry.shape), chunks)
    entries.update((name, BytesStorageMetadata()) for name in found.objects)
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, places in found.places.items():
        for offsets, file, offset, length in places:
            transforms = found.transforms.get((name, offsets))
            storage[MetadataIndex(name, offsets)] = _StorageInfo(found.files[file], offset, length, transforms)
    return Metadata(entries, dict(found.paths), storage)


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
