"""Any byte range of a whole tensor in row-major order, gathered from the pieces that it was saved in.

The pieces are boxes. A tensor that was split along its first dimension is a few long byte ranges; one that was split
along another dimension is, row by row, a few short ones. A block of rows is put together by one scattering read
(`preadv`) for each piece, so that what is written is one long range again, and no array library is needed.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from veomni_ckpt.checkpoint import Checkpoint, Piece, Tensor
from veomni_ckpt.errors import DamagedCheckpointError
from veomni_ckpt.tiling import volume

Shape = tuple[int, ...]

BLOCK = 2 * 2**20
_PAGE = 4_096
_MAX_SLICES = 1_024  # IOV_MAX
_MAX_ROWS = 4_096  # of a block: each is a Python object for every strip
_KEPT_SLICES = 32_768


class Strip(NamedTuple):
    """Part of a piece: `width` bytes from byte `column` on of each of `rows` rows, one after the other in a file."""

    row: int
    column: int
    rows: int
    width: int
    file: int
    begin: int


class TensorReader:
    """Reads one tensor of a checkpoint.

    Attributes:
        row_bytes: length of a row: what follows an index of the dimensions before the last one that is split.
        nbytes: of the whole tensor.
    """

    def __init__(self, checkpoint: Checkpoint, tensor: Tensor) -> None:
        self._checkpoint, self._tensor = checkpoint, tensor
        self.nbytes = tensor.nbytes
        pieces = checkpoint.pieces(tensor.name)
        self.row_bytes, strips = _strips(tensor.shape, tensor.dtype.itemsize, pieces)
        self._strips = sorted(strips)
        self._rows = [strip.row for strip in self._strips]
        self._most_rows = max((strip.rows for strip in self._strips), default=1)
        self._in_one_row = self.row_bytes == self.nbytes
        self._columns = [strip.column for strip in self._strips] if self._in_one_row else []

    def block_bytes(self, wanted: int) -> int:
        """A good block length up to `wanted`: whole rows if they fit, so many that they are whole pages if they can."""
        if self.row_bytes == 0 or self.row_bytes > wanted:
            return wanted
        rows = min(wanted // self.row_bytes, _MAX_ROWS)
        step = _PAGE // math.gcd(self.row_bytes, _PAGE)
        return (rows // step * step or rows) * self.row_bytes

    def read(
        self, begin: int, end: int, buffer: memoryview, slices: dict[tuple[int, ...], list[memoryview]] | None = None
    ) -> None:
        """Fill the beginning of `buffer` with bytes `begin` to `end` of the tensor.

        Args:
            begin, end: in the tensor's row-major form.
            buffer: at least that long.
            slices: of the buffer, from one call to the next, of any tensor: it is quicker if the caller keeps them.

        Raises:
            DamagedCheckpointError: a file ends too soon, or cannot be read.
        """
        row_bytes = self.row_bytes
        slices = {} if slices is None else slices
        at = begin
        while at < end:
            row, column = divmod(at, row_bytes)
            if column == 0 and end - at >= 2 * row_bytes:
                rows = (end - at) // row_bytes
                self._read_rows(row, row + rows, buffer, at - begin, slices)
                at += rows * row_bytes
            else:
                stop = min(end, (row + 1) * row_bytes)
                self._read_in_row(row, column, column + stop - at, buffer[at - begin : stop - begin])
                at = stop

    def _read_in_row(self, row: int, begin: int, end: int, out: memoryview) -> None:
        for strip in self._in_rows(row, row + 1, begin, end):
            first, last = max(begin, strip.column), min(end, strip.column + strip.width)
            if first < last:
                source = strip.begin + (row - strip.row) * strip.width + first - strip.column
                fill(
                    self._checkpoint,
                    self._tensor.name,
                    strip.file,
                    [out[first - begin : last - begin]],
                    last - first,
                    source,
                )

    def _read_rows(
        self, begin: int, end: int, buffer: memoryview, at: int, kept: dict[tuple[int, ...], list[memoryview]]
    ) -> None:
        for strip in self._in_rows(begin, end, 0, self.row_bytes):
            first, last = max(begin, strip.row), min(end, strip.row + strip.rows)
            source = strip.begin + (first - strip.row) * strip.width
            if strip.width == self.row_bytes:
                place = at + (first - begin) * self.row_bytes
                length = (last - first) * self.row_bytes
                self._fill(strip.file, [buffer[place : place + length]], length, source)
                continue
            slices = self._row_slices(buffer, at, strip.column, strip.width, end - begin, kept)
            for group in range(first - begin, last - begin, _MAX_SLICES):
                some = slices[group : min(group + _MAX_SLICES, last - begin)]
                self._fill(strip.file, some, len(some) * strip.width, source)
                source += len(some) * strip.width

    def _row_slices(
        self,
        buffer: memoryview,
        at: int,
        column: int,
        width: int,
        rows: int,
        kept: dict[tuple[int, ...], list[memoryview]],
    ) -> list[memoryview]:
        """The places of a strip in `rows` rows of the buffer; the same for all blocks of a tensor, and for others."""
        key = at, self.row_bytes, column, width
        slices = kept.get(key)
        if slices is None or len(slices) < rows:
            if sum(len(known) for known in kept.values()) + rows > _KEPT_SLICES:
                kept.clear()
            ends = range(at + column, at + column + rows * self.row_bytes, self.row_bytes)
            slices = kept[key] = [buffer[end : end + width] for end in ends]
        return slices

    def _in_rows(self, begin: int, end: int, first_column: int, last_column: int) -> Iterator[Strip]:
        """The strips that have bytes in these rows; of a tensor of one row, those in these columns."""
        if self._in_one_row:
            start = max(0, bisect_right(self._columns, first_column) - 1)
            yield from self._strips[start : bisect_left(self._columns, last_column)]
            return
        start = bisect_left(self._rows, begin - self._most_rows + 1)
        for strip in self._strips[start : bisect_left(self._rows, end)]:
            if strip.row + strip.rows > begin:
                yield strip

    def _fill(self, file: int, parts: list[memoryview], length: int, source: int) -> None:
        fill(self._checkpoint, self._tensor.name, file, parts, length, source)


def fill(checkpoint: Checkpoint, name: str, file: int, parts: list[memoryview], length: int, source: int) -> None:
    """Read `length` bytes of file number `file`, from byte `source` on, into buffers of that length together.

    Raises:
        DamagedCheckpointError: naming the file and the tensor; the file ends too soon, or cannot be read.
    """
    try:
        descriptor = checkpoint.descriptor(file)
        done = os.preadv(descriptor, parts, source)
        if done == length:
            return
        for part in parts:  # interrupted: what is left, piece by piece
            if done >= len(part):
                done -= len(part)
                source += len(part)
                continue
            while done < len(part):
                count = os.preadv(descriptor, [part[done:]], source + done)
                if count == 0:
                    raise DamagedCheckpointError(f"{checkpoint.name_of(file)} ends within {name}: it was cut")
                done += count
            source += len(part)
            done = 0
    except OSError as error:
        where = checkpoint.name_of(file)
        raise DamagedCheckpointError(f"{where} cannot be read at {name} ({error.strerror})") from error


def _strips(shape: Shape, itemsize: int, pieces: list[Piece]) -> tuple[int, list[Strip]]:
    """The length of a row in bytes, and the strips of all pieces."""
    split = [number for number, size in enumerate(shape) if any(piece.sizes[number] != size for piece in pieces)]
    last = split[-1] if split else 0  # the last dimension that is split
    inner = volume(shape[last + 1 :]) * itemsize
    row_bytes = (shape[last] if shape else 1) * inner
    outer = shape[:last]
    strips = []
    for piece in pieces:
        column = piece.offsets[last] * inner if shape else 0
        width = piece.sizes[last] * inner if shape else inner
        begin = piece.begin
        for row, rows in _row_ranges(outer, piece.offsets[:last], piece.sizes[:last]):
            strips.append(Strip(row, column, rows, width, piece.file, begin))
            begin += rows * width
    return row_bytes, strips


def _row_ranges(shape: Shape, offsets: Shape, sizes: Shape) -> Iterator[tuple[int, int]]:
    """(first, number) of the consecutive rows that a box of the outer dimensions has, in its own order."""
    split = [number for number, size in enumerate(shape) if sizes[number] != size]
    if not split:
        yield 0, volume(shape)
        return
    last = split[-1]
    below = volume(shape[last + 1 :])
    strides = [volume(shape[number + 1 :]) for number in range(last)]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=False)) + offsets[last] * below
    for number in range(volume(sizes[:last])):
        row, rest = base, number
        for dimension in range(last - 1, -1, -1):
            rest, index = divmod(rest, sizes[dimension])
            row += index * strides[dimension]
        yield row, sizes[last] * below
