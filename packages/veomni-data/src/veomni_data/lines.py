"""JSON lines and plain text: a row a line, found by an index of the lines or read as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .errors import DataError
from .files import DataFile
from .row import checked_values

Array = npt.NDArray[np.int64]
ParseLine = Callable[[bytes, bool], dict[str, Any]]

LONGEST_LINE = 1 << 28
_COUNTED = 1 << 30  # up to this byte of a file the lines are counted to name one: a fraction of a second
_CHUNK = 1 << 24
_BLANK = b" \t\r\n"


def parse_json_line(line: bytes, first: bool) -> dict[str, Any]:
    """The object that a line is; `first` may begin with a byte-order mark.

    Not `datasets`: a column there has one type, and the `content` of a message may be a string in one row and a list
    in the next; nothing is cached that could be stale; and an error can name the line.
    """
    try:
        return checked_values(json.loads(decode(line, first).rstrip("\r\n")))
    except json.JSONDecodeError as error:
        raise DataError(f"this line is not JSON ({error.msg}, column {error.colno})", reason="bad row") from error
    except RecursionError as error:
        raise DataError("this line is nested too deep", reason="bad row") from error


def parse_text_line(line: bytes, first: bool) -> dict[str, Any]:
    """`{"text": line}`, without the line's end."""
    return {"text": decode(line, first).rstrip("\r\n")}


def decode(line: bytes, first: bool) -> str:
    """The text of a line; DataError where it is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"this line is not UTF-8 (byte {error.start + 1})", reason="bad row") from error


class LineIndex:
    """The lines of a file on this machine that are not blank, with random access."""

    def __init__(self, file: DataFile, parse: ParseLine) -> None:
        self.file = file
        self._parse = parse
        self._begins, self._ends, self._numbers = index_lines(file)

    def __len__(self) -> int:
        return len(self._begins)

    def values(self, index: int) -> dict[str, Any]:
        """The columns of a row."""
        begin = int(self._begins[index])
        return self._parse(read_bytes(self.file, begin, int(self._ends[index]) - begin), begin == 0)

    def place(self, index: int) -> str:
        """The file and line."""
        return f"{self.file.name}:{self._numbers[index]}"


class LineStream:
    """The lines of a file that are not blank, from any byte on. A position is the byte (unpacked) where one begins."""

    def __init__(self, file: DataFile, parse: ParseLine) -> None:
        self.file = file
        self._parse = parse
        self.cut: Literal["bytes"] | None = None if file.compression or file.size is None else "bytes"
        self.seekable = file.compression is None
        # where a line can be read again at no cost, only its length is passed around
        self._reads_again = self.seekable and file.local is not None

    def align(self, offset: int) -> int:
        """The first position of a line at or behind a byte."""
        if offset == 0:
            return 0
        position = offset - 1
        with self.file.open(position) as lines:
            while piece := lines.readline(_CHUNK):
                position += len(piece)
                if piece.endswith(b"\n"):
                    break
        return position

    def read(self, position: int, end: int | None = None) -> Iterator[tuple[int, Any]]:
        """The lines that begin from a position on and before `end`."""
        with self.file.open(position) as lines:
            while (end is None or position < end) and (line := lines.readline(LONGEST_LINE)):
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    raise DataError(f"{self.place(position)}: a line of more than {LONGEST_LINE >> 20} MB")
                if line.strip(_BLANK):
                    yield position, len(line) if self._reads_again else line
                position += len(line)

    def values(self, position: int, payload: Any) -> dict[str, Any]:
        """The columns of a row that was read."""
        line = payload if isinstance(payload, bytes) else read_bytes(self.file, position, payload)
        return self._parse(line, position == 0)

    def place(self, position: int) -> str:
        """The file and line; its byte where counting lines would take long."""
        return name_line(self.file, position)

    def quick_place(self, position: int, payload: Any) -> str:
        """The file and byte."""
        return f"{self.file.name}, byte {position}"


def name_line(file: DataFile, position: int) -> str:
    """The file and line where the line begins at a byte, or that byte where counting lines would take long."""
    if position > _COUNTED:
        return f"{file.name}, byte {position}"
    try:
        return f"{file.name}:{_count_lines(file, position) + 1}"
    except OSError:
        return f"{file.name}, byte {position}"


def read_bytes(file: DataFile, begin: int, length: int) -> bytes:
    """Bytes of a file on this machine; DataError if it is not there any more."""
    assert file.local is not None
    # opened for each row: a handle would be shared by the worker processes, and an open costs less than a parse;
    # without a buffer, which would be filled beyond what is asked for
    try:
        with file.local.open("rb", buffering=0) as content:
            content.seek(begin)
            data = content.read(length)
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror or error}", reason="missing file") from error
    if len(data) != length:
        raise DataError("the file is shorter than it was", reason="missing file")
    return data


def index_lines(file: DataFile) -> tuple[Array, Array, Array]:
    """Where the lines that are not blank begin and end (bytes), and their numbers from 1; int64."""
    assert file.local is not None
    size = file.local.stat().st_size
    if size == 0:
        return (np.zeros(0, np.int64),) * 3
    data = np.memmap(file.local, np.uint8, mode="r")
    # chunk by chunk, as the comparison makes an array as large as what it is given
    breaks = np.concatenate([np.flatnonzero(data[at : at + _CHUNK] == ord("\n")) + at for at in range(0, size, _CHUNK)])
    begins = np.concatenate([np.zeros(1, np.int64), breaks + 1])
    ends = np.concatenate([breaks, np.array([size], np.int64)])
    keep = ends > begins
    for i in np.flatnonzero(keep)[np.isin(data[begins[keep]], np.frombuffer(_BLANK, np.uint8))]:
        keep[i] = bool(data[begins[i] : ends[i]].tobytes().strip(_BLANK))
    return begins[keep], ends[keep], np.flatnonzero(keep) + 1


@lru_cache(maxsize=256)
def _count_lines(file: DataFile, position: int) -> int:
    lines = 0
    with file.open() as content:
        while position > 0 and (data := content.read(min(position, _CHUNK))):
            lines += data.count(b"\n")
            position -= len(data)
    return lines
