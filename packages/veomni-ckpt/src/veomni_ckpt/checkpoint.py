"""A checkpoint of any format as names, shapes and byte ranges; torch is not needed to read one."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from veomni_ckpt.dtypes import Dtype
from veomni_ckpt.errors import DamagedCheckpointError
from veomni_ckpt.tiling import volume

Shape = tuple[int, ...]

_OPEN_FILES = 200  # of a thread
SCRATCH = -1  # the number of the temporary file


@dataclass(frozen=True, slots=True)
class Tensor:
    """Name, element type and shape of a whole tensor."""

    name: str
    dtype: Dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Its size in row-major form."""
        return volume(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor as row-major bytes: `begin` in file number `file` of the checkpoint."""

    offsets: Shape
    sizes: Shape
    file: int
    begin: int


@dataclass
class Checkpoint:
    """An open checkpoint; close it, or use it in `with`.

    Attributes:
        path: as it was given.
        kind: the format in words.
        tensors: by name, in the order of the file.
        objects: names of items that are no tensors; their content is never read.
        paths: DCP only: name -> keys and indices that lead to it in the nested state dict.
        files: number -> data file.
        sizes: of `files` in bytes.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    objects: list[str] = field(default_factory=list)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    scratch_folder: Path | None = None
    _open: dict[int, dict[int, int]] = field(default_factory=dict)  # thread -> number -> descriptor
    _scratch: BinaryIO | None = None
    _pieces: dict[str, list[Piece]] = field(default_factory=dict)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; temporary ones are gone with that."""
        for opened in self._open.values():
            for descriptor in opened.values():
                os.close(descriptor)
        self._open.clear()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def folder(self) -> Path:
        """Where config and tokenizer files lie, if the checkpoint has any."""
        return self.path if self.path.is_dir() else self.path.parent

    def descriptor(self, file: int) -> int:
        """The open file of that number; valid until this thread's next call."""
        if file == SCRATCH and self._scratch is not None:
            return self._scratch.fileno()
        opened = self._open.setdefault(threading.get_ident(), {})
        descriptor = opened.pop(file, None)
        if descriptor is None:
            if len(opened) >= _OPEN_FILES:
                os.close(opened.pop(next(iter(opened))))
            try:
                descriptor = os.open(self.files[file], os.O_RDONLY | os.O_NONBLOCK)
            except OSError as error:
                raise DamagedCheckpointError(f"{self.files[file]} cannot be read ({error.strerror})") from error
        opened[file] = descriptor  # the last one is the one used last
        return descriptor

    def name_of(self, file: int) -> str:
        """The path of a file for a message."""
        return "a temporary file" if file == SCRATCH else str(self.files[file])

    def pieces(self, name: str) -> list[Piece]:
        """The boxes that make up a tensor, all of it exactly once.

        Raises:
            DamagedCheckpointError: naming file, tensor and what is wrong.
        """
        return self._pieces[name]

    def chunk_count(self, name: str) -> int:
        """The number of boxes that a tensor was saved in."""
        return len(self._pieces[name])
