"""CSV and TSV: a row a record, whose quoted fields may hold line ends."""

from __future__ import annotations

import csv
import mmap
import re
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from .errors import DataError
from .files import DataFile
from .lines import LONGEST_LINE, decode, index_lines, name_line, read_bytes

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_RECORD = 1 << 24  # a quote that is still open then was none
_BLANK = b" \t\r\n"


class RecordIndex:
    """The records of a file on this machine behind its header, with random access."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self._delimiter = DELIMITERS[file.suffix]
        self._begins, self._ends, self._numbers = _index_records(file)
        self._columns = _columns(self._read(0), self._delimiter, file.name) if len(self._begins) else []

    def __len__(self) -> int:
        return max(len(self._begins) - 1, 0)

    def values(self, index: int) -> dict[str, Any]:
        """The columns of a row, all as text."""
        return _values(self._read(index + 1), self._columns, self._delimiter)

    def place(self, index: int) -> str:
        """The file and the line where the record begins."""
        return f"{self.file.name}:{self._numbers[index + 1]}"

    def _read(self, record: int) -> bytes:
        begin = int(self._begins[record])
        return read_bytes(self.file, begin, int(self._ends[record]) - begin)


class RecordStream:
    """The records of a file behind its header. A position is the byte (unpacked) where one begins.

    A byte in the middle does not tell whether it lies within quotes, so that the file cannot be cut.
    """

    cut = None

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.seekable = file.compression is None
        self._delimiter = DELIMITERS[file.suffix]
        self._known: list[str] | None = None

    def read(self, position: int, end: int | None = None) -> Iterator[tuple[int, Any]]:
        """The records from a position on."""
        header = position == 0
        with self.file.open(position) as content:
            for begin, _, record in _records(content, position, self._delimiter):
                if not header:
                    yield begin, record
                header = False

    def values(self, position: int, payload: Any) -> dict[str, Any]:
        """The columns of a row that was read, all as text."""
        if self._known is None:
            with self.file.open() as content:
                _, _, header = next(_records(content, 0, self._delimiter))
            self._known = _columns(header, self._delimiter, self.file.name)
        return _values(payload, self._known, self._delimiter)

    def place(self, position: int) -> str:
        """The file and the line where the record begins."""
        return name_line(self.file, position)

    def quick_place(self, position: int, payload: Any) -> str:
        """The file and byte."""
        return f"{self.file.name}, byte {position}"


def _columns(header: bytes, delimiter: str, name: str) -> list[str]:
    columns = _fields(decode(header, True), delimiter)
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise DataError(f'{name}:1: the header names the column "{twice[0]}" twice', reason="bad row")
    return columns


def _values(record: bytes, columns: list[str], delimiter: str) -> dict[str, Any]:
    if _is_open(record, delimiter):
        raise DataError("a quote is opened and not closed", reason="bad row")
    fields = _fields(decode(record, False), delimiter)
    if len(fields) != len(columns):
        raise DataError(f"this record has {len(fields)} fields, the header {len(columns)}", reason="bad row")
    return dict(zip(columns, fields, strict=True))


def _fields(record: str, delimiter: str) -> list[str]:
    limit = csv.field_size_limit(sys.maxsize)  # it is a setting of the whole process: left as it was found
    try:
        return next(csv.reader([record.rstrip("\r\n")], delimiter=delimiter))
    except csv.Error as error:
        raise DataError(f"this record cannot be read ({error})", reason="bad row") from error
    finally:
        csv.field_size_limit(limit)


def _records(content: BinaryIO, position: int, delimiter: str) -> Iterator[tuple[int, int, bytes]]:
    """Where each record that is not blank begins, on which line counted from 0 here, and its bytes.

    A line whose quote is never closed is a record of its own, so that it takes no others with it.
    """
    ahead: deque[bytes] = deque()  # lines that were read for a record and then were none of it
    number = 0
    while line := _next_line(content, ahead):
        lines = [line]
        size = len(line)
        is_open = _is_open(line, delimiter)
        while is_open and size < _LONGEST_RECORD and (more := _next_line(content, ahead)):
            lines.append(more)
            size += len(more)
            # a line that begins within quotes is as one that begins with a quote
            is_open = b'"' not in more or _is_open(b'"' + more, delimiter)
        if is_open:
            ahead.extendleft(reversed(lines[1:]))
            del lines[1:]
        record = b"".join(lines)
        if record.strip(_BLANK):
            yield position, number, record
        position += len(record)
        number += len(lines)


def _next_line(content: BinaryIO, ahead: deque[bytes]) -> bytes:
    return ahead.popleft() if ahead else content.readline(LONGEST_LINE)


def _is_open(record: bytes, delimiter: str) -> bool:
    """Whether a record ends within quotes, as Python's csv module understands them."""
    return b'"' in record and _OPEN[delimiter].fullmatch(record) is not None


def _open_pattern(delimiter: str) -> re.Pattern[bytes]:
    """Whole fields, quoted or not, and then one whose quote is not closed; possessive, to take linear time."""
    quoted, field, other = rb'"[^"]*+(?:""[^"]*+)*+', rb'(?:%b"[^%b]*+|[^"%b][^%b]*+)?+%b', delimiter.encode()
    return re.compile(rb"(?:%b)*+%b" % (field % (quoted, other, other, other, other), quoted))


_OPEN = {delimiter: _open_pattern(delimiter) for delimiter in DELIMITERS.values()}


def _index_records(file: DataFile) -> tuple[Any, Any, Any]:
    """Where records begin and end (bytes) and the numbers of their lines from 1; int64."""
    assert file.local is not None
    if file.local.stat().st_size == 0:
        return index_lines(file)
    with file.local.open("rb") as content:
        with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
            quoted = data.find(b'"') >= 0
        if not quoted:
            return index_lines(file)
        records = _records(content, 0, DELIMITERS[file.suffix])
        found = [(begin, begin + len(record), number + 1) for begin, number, record in records]
    begins, ends, numbers = np.array(found, np.int64).reshape(-1, 3).T
    return begins.copy(), ends.copy(), numbers.copy()
