"""Stored tensors that are not plain row-major bytes, written out as such into nameless temporary files.

What odd strides (a transposed parameter), or a compressing extension left in a checkpoint, is made straight once, in
bounded memory; everything after that deals with byte ranges only.
"""

from __future__ import annotations

import importlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.saved_item import ItemError, StoredTensor
from veomni_ckpt.tiling import volume

Shape = tuple[int, ...]

_BLOCK = 8 * 2**20


def is_row_major(shape: Shape, strides: Shape) -> bool:
    """Whether the elements lie one after the other in the order of their indices."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def temporary(folder: Path | None) -> BinaryIO:
    """A file without a name, in `folder` or where the system keeps such; it is gone when closed."""
    return tempfile.TemporaryFile(dir=folder)


def straighten(descriptor: int, stored: StoredTensor, out: BinaryIO) -> None:
    """Write a tensor with any strides to `out` in row-major order.

    Memory: one block of some MB, or one index of the first dimension if that is more; all of its storage if strides
    overlap or leave gaps, which torch's writer never does.
    """
    import numpy as np

    itemsize = stored.dtype.itemsize
    element = np.dtype((np.void, itemsize))
    # dimensions of size 1 may have any stride
    kept = [number for number, size in enumerate(stored.shape) if size != 1]
    shape = tuple(stored.shape[number] for number in kept)
    strides = tuple(stored.strides[number] for number in kept)
    order = sorted(range(len(shape)), key=lambda number: -strides[number])
    in_memory = tuple(shape[number] for number in order)
    if not is_row_major(in_memory, tuple(strides[number] for number in order)):
        raw = np.frombuffer(_read(descriptor, stored.begin, stored.nbytes // itemsize * itemsize), element)
        view = np.lib.stride_tricks.as_strided(raw[stored.first :], shape, [stride * itemsize for stride in strides])
        for row in view:
            out.write(np.ascontiguousarray(row).tobytes())
        out.flush()
        return
    position = order.index(0)
    before, inner = in_memory[:position], volume(in_memory[position + 1 :]) * itemsize
    base = stored.begin + stored.first * itemsize
    step = max(1, _BLOCK // max(1, volume(shape[1:]) * itemsize))
    to_logical = [order.index(number) for number in range(len(order))]
    for first in range(0, shape[0], step):
        count = min(step, shape[0] - first)
        # of each slice before the first dimension, the run of bytes that holds these indices of it
        runs = [
            _read(descriptor, base + (number * shape[0] + first) * inner, count * inner)
            for number in range(volume(before))
        ]
        box = np.frombuffer(b"".join(runs), element).reshape(*before, count, *in_memory[position + 1 :])
        out.write(np.ascontiguousarray(box.transpose(to_logical)).tobytes())
    out.flush()


def _read(descriptor: int, begin: int, count: int) -> bytes:
    data = os.pread(descriptor, count, begin)
    while len(data) < count:
        more = os.pread(descriptor, count - len(data), begin + len(data))
        if not more:
            raise ItemError("it ends too soon")
        data += more
    return data


def decompress(
    descriptor: int, offset: int, length: int, transforms: tuple[str, ...], limit: int, out: BinaryIO
) -> int:
    """Undo what an item of `length` bytes went through, writing at most `limit` bytes to `out`; gives their number.

    Raises:
        CheckpointError: a transformation that is unknown, or without an installed decoder.
        ItemError: damaged data, or more of it than the tensor can be.
    """
    if transforms != ("stream.zstd/1",):
        raise CheckpointError(f"it was written through {', '.join(transforms)[:200]}: only stream.zstd/1 is known")
    source = io.BufferedReader(_Range(descriptor, offset, length), 2**18)
    stream = _zstd_reader(source)
    written = 0
    while True:
        try:
            data = stream.read(2**18)  # bounded: a few compressed bytes can stand for gigabytes
        except Exception as error:  # each decoder has an error class of its own
            raise ItemError(f"its compressed data is damaged: {' '.join(str(error).split())[:200]}") from error
        if not data:
            break
        written += len(data)
        if written > limit:
            raise ItemError(f"its compressed data is more than the {limit} bytes that the tensor can be")
        out.write(data)
    out.flush()
    return written


class _Range(io.RawIOBase):
    """A part of an open file as a stream."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._at, self._end = descriptor, offset, offset + length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._descriptor, [memoryview(buffer)[: self._end - self._at]], self._at)
        self._at += count
        return count


def _zstd_reader(source: BinaryIO) -> Any:
    """A stream of what `source` decodes to."""
    for module in ("compression.zstd", "pyzstd"):
        try:
            return importlib.import_module(module).ZstdFile(source)
        except ImportError:
            continue
    try:
        return importlib.import_module("zstandard").ZstdDecompressor().stream_reader(source)
    except ImportError:
        raise CheckpointError("it is compressed with zstd: install `zstandard` to read it") from None
