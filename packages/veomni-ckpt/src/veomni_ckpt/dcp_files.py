"""The files of torch's distributed checkpoint (DCP) as its own readers need them, without letting them run anything.

DCP's `.metadata` is a pickle and its readers unpickle it as it is: whoever wrote the file runs code in whoever loads
it. Here it is read by `metadata_reader`, and what that found is handed over as torch's classes. Items that are not
tensors are pickles too; they are neither written nor read: `state_tree` keeps what is no tensor.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
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
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.utils import _ReaderView
from torch.futures import Future

from veomni_ckpt.durable import naming
from veomni_ckpt.errors import DamagedCheckpointError
from veomni_ckpt.manifest import fault_of_item
from veomni_ckpt.metadata_reader import DcpMetadata, parse_dcp_metadata
from veomni_ckpt.storage import is_remote


def read_metadata(path: Path, data: bytes) -> Metadata:
    """The table of contents of a DCP folder, from the bytes of its `.metadata`; `path` is for the messages.

    Raises:
        DamagedCheckpointError: they are cut short, or ask for anything that DCP does not write.
    """
    return _as_torch(parse_dcp_metadata(path, data))


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


def verify_ranges(folder: Path, metadata: Metadata, sizes: dict[str, int]) -> None:
    """Check that every byte range that the metadata names lies in a file of the folder, and covers every tensor.

    Args:
        folder: for the messages.
        sizes: the length in bytes of each file that is there.

    Raises:
        DamagedCheckpointError: naming the file and what is wrong with it.
    """
    try:
        _verify_ranges(folder, metadata, sizes)
    except (AttributeError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder / '.metadata'} is inconsistent ({error})") from error


def _verify_ranges(folder: Path, metadata: Metadata, sizes: dict[str, int]) -> None:
    ends: dict[str, int] = {}
    for item in metadata.storage_data.values():
        name = item.relative_path
        if name != PurePosixPath(name).name or item.offset < 0 or item.length < 0:
            raise DamagedCheckpointError(
                f"{folder / '.metadata'} names {name!r} at {item.offset}, which is not in the folder"
            )
        ends[name] = max(ends.get(name, 0), item.offset + item.length)
    for name, end in ends.items():
        if name not in sizes:
            raise DamagedCheckpointError(f"{folder / name} is missing")
        if sizes[name] < end:
            raise DamagedCheckpointError(f"{folder / name} is truncated: {sizes[name]} bytes of {end}")

    stored = {(index.fqn, index.offset) for index in metadata.storage_data}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            absent = [chunk for chunk in entry.chunks if (name, chunk.offsets) not in stored]
            if absent or covered != math.prod(entry.size):
                raise DamagedCheckpointError(f"{folder / '.metadata'} does not say where all of {name} is stored")


def open_writer(folder: Path) -> FileSystemWriter:
    """DCP's writer of files into a folder that is empty."""
    if is_remote(folder):
        writer = FsspecWriter(str(folder), sync_files=False, overwrite=False)  # a store has nothing to sync
    else:
        writer = FileSystemWriter(folder, overwrite=False)
    writer.fs = _Telling(writer.fs)
    return writer


class _Telling:
    """A file system of DCP that says what went wrong with a file, whatever torch's archive writer makes of it."""

    def __init__(self, system: Any) -> None:
        self._system = system

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system, name)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        # a full disk may show at any write, or when the stream is closed
        with naming(path), self._system.create_stream(path, mode) as raw:
            stream = _TellingStream(raw)
            try:
                yield stream
            except Exception as error:
                raise stream.fault or error from error


class _TellingStream:
    """A stream that remembers the first error of a write: torch.save replaces it by one of its own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.fault: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        try:
            written: int = self._stream.write(data)
        except Exception as error:
            self.fault = self.fault or error
            raise
        return written


class SafeReader(FileSystemReader):
    """DCP's reader of files, with metadata that `read_metadata` has read; every item is held against its checksum."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(str(folder))
        self._remote = is_remote(folder)
        if self._remote:
            remote = FsspecReader(str(folder))
            self.fs, self.path = remote.fs, remote.path
        self._folder, self._metadata = folder, metadata
        places = metadata.storage_data.items()
        self._names = {(info.relative_path, info.offset): index.fqn for index, info in places}
        self._whole: set[tuple[str, int]] = set()
        self._reading = str(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the constructor was given; the file is not read again."""
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As torch's; what cannot be read is named."""
        try:
            return super().read_data(plan, planner)
        except DamagedCheckpointError:
            raise
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise DamagedCheckpointError(f"{self._reading}: {lines[0]}") from error

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        key = sinfo.relative_path, sinfo.offset
        self._reading = f"{self._folder / sinfo.relative_path} is damaged at {self._names[key]}"
        item: Any = _Item(file, sinfo.offset, sinfo.length)
        if self._remote:
            item = io.BytesIO(item.read())  # one request in the place of many short ones
        if key not in self._whole:
            if fault := fault_of_item(item):
                raise DamagedCheckpointError(f"{self._reading}: {fault}")
            self._whole.add(key)
        item.seek(0)
        return item


class _Item(_ReaderView):
    """DCP's view of a part of a file, in which one may also seek from the end (a sign is wrong there in torch 2.14)."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """The position in the part."""
        if whence == os.SEEK_END:
            offset, whence = self.len + offset, os.SEEK_SET
        if offset < 0:
            raise ValueError("it refers to bytes before its beginning")
        return super().seek(offset, whence) - self.offset
