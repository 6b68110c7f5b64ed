"""A DCP folder as names, shapes and byte ranges."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from veomni_ckpt.checkpoint import SCRATCH, Checkpoint, Piece, Tensor
from veomni_ckpt.errors import CheckpointError, DamagedCheckpointError
from veomni_ckpt.metadata_reader import DcpMetadata, TensorEntry, read_dcp_metadata
from veomni_ckpt.safetensors_files import Header, read_header
from veomni_ckpt.saved_item import Described, ItemError, StoredTensor, locate
from veomni_ckpt.scratch import decompress, is_row_major, straighten, temporary
from veomni_ckpt.tiling import Box, fault_of_tiling, volume

Shape = tuple[int, ...]

_KEPT_PIECES = 20_000
_ITEM_OVERHEAD = 2**20  # bytes of an item that are not the tensor's, at most


@dataclass
class DcpCheckpoint(Checkpoint):
    """A DCP folder; the places of its bytes are looked up in its data files when they are asked for."""

    metadata: list[DcpMetadata] = field(default_factory=list)
    _chunks: dict[str, list[Box]] = field(default_factory=dict)
    _known: dict[bytes, Described] = field(default_factory=dict)
    _headers: dict[int, Header] = field(default_factory=dict)
    _sound: set[tuple[Shape, tuple[Box, ...]]] = field(default_factory=set)
    _is_safetensors: dict[int, bool] = field(default_factory=dict)
    _kept: int = 0

    def chunk_count(self, name: str) -> int:
        """The number of boxes that a tensor was saved in."""
        return len(self._chunks[name])

    def pieces(self, name: str) -> list[Piece]:
        """The boxes that make up a tensor, all of it exactly once."""
        if name in self._pieces:
            return self._pieces[name]
        tensor, chunks = self.tensors[name], tuple(self._chunks[name])
        if (tensor.shape, chunks) not in self._sound:
            if fault := fault_of_tiling(tensor.shape, chunks):
                raise DamagedCheckpointError(f"{self.metadata[0].path} describes {name} wrongly: {fault}")
            self._sound.add((tensor.shape, chunks))
        pieces = self._find_pieces(tensor, chunks)
        # found again quickly, but for those in the temporary file; those of a large model would take much memory
        if self._kept + len(pieces) <= _KEPT_PIECES or any(piece.file == SCRATCH for piece in pieces):
            self._kept += len(pieces)
            self._pieces[name] = pieces
        return pieces

    def _find_pieces(self, tensor: Tensor, chunks: Iterable[Box]) -> list[Piece]:
        where: dict[Shape | None, tuple[int, int, int]] = {}
        base = 0
        for metadata in self.metadata:
            if places := metadata.places.get(tensor.name):
                for offsets, file, offset, length in places:
                    where.setdefault(offsets, (base + file, offset, length))
            base += len(metadata.files)
        pieces = []
        for offsets, sizes in chunks:
            if 0 in sizes:
                continue
            if offsets not in where:
                raise DamagedCheckpointError(
                    f"{self.metadata[0].path} does not say where the chunk of {tensor.name} at {list(offsets)} is"
                )
            file, offset, length = where[offsets]
            try:
                pieces.append(self._find_piece(tensor, (offsets, sizes), file, offset, length))
            except ItemError as error:
                raise DamagedCheckpointError(
                    f"{self.files[file]} has no readable {tensor.name} at byte {offset}: {error}"
                ) from error
            except OSError as error:
                raise DamagedCheckpointError(f"{self.files[file]} cannot be read ({error.strerror})") from error
        return pieces

    def _find_piece(self, tensor: Tensor, chunk: Box, file: int, offset: int, length: int) -> Piece:
        offsets, sizes = chunk
        descriptor = self.descriptor(file)
        key = tensor.name, offsets
        transforms = next((metadata.transforms[key] for metadata in self.metadata if key in metadata.transforms), ())
        if transforms:
            limit = volume(sizes) * tensor.dtype.itemsize + _ITEM_OVERHEAD
            stream, begin = self._scratch_end()
            try:
                length = decompress(descriptor, offset, length, transforms, limit, stream)
            except CheckpointError as error:
                raise CheckpointError(f"{self.files[file]} cannot be read: {error}") from error
            file, offset, descriptor = SCRATCH, begin, stream.fileno()
        else:
            if file not in self._is_safetensors:
                head = os.pread(descriptor, 9, offset)
                if head[:4] != b"PK\x03\x04" and head[8:] != b"{":
                    raise ItemError("neither torch.save nor safetensors wrote it there")
                self._is_safetensors[file] = head[8:] == b"{"
            if self._is_safetensors[file]:
                return self._in_safetensors(tensor, chunk, file)
        stored = locate(descriptor, offset, length, self._known)
        if stored.dtype != tensor.dtype or stored.shape != sizes:
            raise ItemError(
                f"it is {stored.dtype.name} {list(stored.shape)}, the metadata says {tensor.dtype.name} {list(sizes)}"
            )
        if is_row_major(stored.shape, stored.strides):
            return Piece(offsets, sizes, file, stored.begin + stored.first * stored.dtype.itemsize)
        return self._straightened(stored, chunk, file)

    def _straightened(self, stored: StoredTensor, chunk: Box, file: int) -> Piece:
        stream, begin = self._scratch_end()
        try:
            straighten(self.descriptor(file), stored, stream)
        except ModuleNotFoundError as error:
            raise CheckpointError(f"{self.files[file]} has a tensor with other strides: install `numpy`") from error
        return Piece(*chunk, SCRATCH, begin)

    def _scratch_end(self) -> tuple[BinaryIO, int]:
        """The temporary file, and where it ends."""
        if self._scratch is None:
            self._scratch = temporary(self.scratch_folder)
        return self._scratch, self._scratch.seek(0, os.SEEK_END)

    def _in_safetensors(self, tensor: Tensor, chunk: Box, file: int) -> Piece:
        """The file is one of the serialization format `SAFETENSORS`: offsets of the metadata mean nothing."""
        if file not in self._headers:
            begin = self._end_of_objects(file)
            self._headers[file] = read_header(self.files[file], begin)
        entry = self._headers[file].tensors.get(tensor.name)
        if entry is None:
            raise ItemError("neither torch.save nor safetensors wrote it there")
        if entry.dtype != tensor.dtype or entry.shape != chunk[1]:
            raise ItemError(
                f"it is {entry.dtype.name} {list(entry.shape)}, the metadata says {tensor.dtype.name} {list(chunk[1])}"
            )
        return Piece(*chunk, file, entry.begin)

    def _end_of_objects(self, file: int) -> int:
        """Where the safetensors part of a file begins: after the items that are no tensors."""
        end, base = 0, 0
        for metadata in self.metadata:
            for name in metadata.objects:
                for _, number, offset, length in metadata.places.get(name, ()):
                    end = max(end, offset + length) if base + number == file else end
            base += len(metadata.files)
        return end

    def check_files(self) -> None:
        """Hold what the metadata says against the files' sizes; reads no data.

        Raises:
            DamagedCheckpointError: a file is missing, too short, no regular file, or outside the folder.
        """
        for metadata in self.metadata:
            ends = [0] * len(metadata.files)
            for places in metadata.places.values():
                rows = places.rows
                for number, offset, length in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
                    if offset + length > ends[number]:
                        ends[number] = offset + length
            for name, end in zip(metadata.files, ends, strict=True):
                path = self.path / name
                parts = PurePosixPath(name).parts
                if not parts or ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
                    raise DamagedCheckpointError(f"{metadata.path} names {name[:200]!r}, which is not in the folder")
                size = _file_size(path)
                if size < end:
                    raise DamagedCheckpointError(f"{path} is truncated: {size} bytes of {end}")
                self.files.append(path)
                self.sizes.append(size)


def open_dcp(path: Path, metadata_files: list[Path], kind: str) -> DcpCheckpoint:
    """Open a DCP folder by its `.metadata`, or by the files in which each rank wrote its own.

    Raises:
        DamagedCheckpointError: naming file, tensor and what is wrong.
    """
    metadata = [read_dcp_metadata(file) for file in metadata_files]
    checkpoint = DcpCheckpoint(path, kind, {}, metadata=metadata)
    for one in metadata:
        for name, entry in one.tensors.items():
            _add_entry(checkpoint, one, name, entry)
        checkpoint.objects += [name for name in one.objects if len(metadata) == 1 or name not in checkpoint.objects]
        checkpoint.paths.update(one.paths)
    checkpoint.check_files()
    return checkpoint


def _add_entry(checkpoint: DcpCheckpoint, metadata: DcpMetadata, name: str, entry: TensorEntry) -> None:
    known = checkpoint.tensors.get(name)
    if known is None:
        checkpoint.tensors[name] = Tensor(name, entry.dtype, entry.shape)
        # a replicated chunk that several ranks wrote counts once
        unique = len(entry.chunks) < 2 or len(set(entry.chunks)) == len(entry.chunks)
        checkpoint._chunks[name] = entry.chunks if unique else list(dict.fromkeys(entry.chunks))
        return
    if (known.dtype, known.shape) != (entry.dtype, entry.shape):
        raise DamagedCheckpointError(f"{metadata.path} describes {name} in another way than the other ranks do")
    checkpoint._chunks[name] = list(dict.fromkeys(checkpoint._chunks[name] + entry.chunks))


def _file_size(path: Path) -> int:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedCheckpointError(f"{path} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise DamagedCheckpointError(f"{path} is no file")
    return status.st_size
