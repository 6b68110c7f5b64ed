"""Parquet and Arrow files: rows of typed columns, as plain Python values (pictures and sound as their bytes)."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Literal

from .errors import DataError
from .files import DataFile, first_line
from .hub import without_progress_bars
from .prepared import decode_rows, is_prepared

_BATCH_BYTES = 1 << 20  # decoded at once when streaming: one stream is open for each row of a step
_BATCH_ROWS = 256


class ArrowIndex:
    """The rows of an Arrow IPC file or stream, mapped into memory."""

    def __init__(self, file: DataFile) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]

        self.file = file
        assert file.local is not None
        self._batches = list(_read_batches(pa.memory_map(str(file.local)), file.name))
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __reduce__(self) -> tuple[object, ...]:
        return ArrowIndex, (self.file,)  # mapped anew in another process

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def values(self, index: int) -> dict[str, Any]:
        """The columns of a row."""
        at = bisect_right(self._ends, index)
        return next(_rows(self._batches[at].slice(index - (self._ends[at - 1] if at else 0), 1)))

    def place(self, index: int) -> str:
        """The file and row."""
        return f"{self.file.name}, row {index + 1}"


class ParquetIndex:
    """The rows of a Parquet file: `datasets` converts it once to Arrow, which is mapped into memory for random access.

    Its cache is keyed by the file's time of change and guarded by a lock, so that ranks may start together.
    """

    def __init__(self, file: DataFile) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        self.file = file
        try:
            self._length: int = pq.read_metadata(file.local).num_rows
        except pa.ArrowException as error:
            raise DataError(f"{file.name} is not a Parquet file: {first_line(error)}") from error
        self._rows = _convert_parquet(file) if self._length else None

    def __len__(self) -> int:
        return self._length

    def values(self, index: int) -> dict[str, Any]:
        """The columns of a row."""
        assert self._rows is not None
        return next(_rows(self._rows.data.fast_slice(index, 1)))

    def place(self, index: int) -> str:
        """The file and row."""
        return f"{self.file.name}, row {index + 1}"


class _RowStream:
    """A file whose rows have numbers: a position is a row from 0."""

    seekable = False  # a row can only be read with those of its row group or batch before it

    def __init__(self, file: DataFile) -> None:
        self.file = file

    def values(self, position: int, payload: Any) -> dict[str, Any]:
        """The columns of a row that was read."""
        return dict(payload)

    def place(self, position: int) -> str:
        """The file and row."""
        return f"{self.file.name}, row {position + 1}"

    def quick_place(self, position: int, payload: Any) -> str:
        """The same."""
        return self.place(position)


class ParquetStream(_RowStream):
    """The rows of a Parquet file in batches."""

    cut: Literal["rows"] = "rows"

    def count(self) -> int:
        """The number of rows."""
        import pyarrow.parquet as pq

        with self.file.open() as content:
            return int(pq.read_metadata(content).num_rows)

    def read(self, position: int, end: int | None = None) -> Iterator[tuple[int, Any]]:
        """The rows from a position on and before `end`."""
        import pyarrow.parquet as pq

        with self.file.open() as content:
            table = pq.ParquetFile(content, buffer_size=_BATCH_BYTES, pre_buffer=False)
            first = 0
            for number in range(table.metadata.num_row_groups):
                group = table.metadata.row_group(number)
                if first + group.num_rows > position and (end is None or first < end):
                    size = _rows_at_once(group.num_rows, group.total_byte_size)
                    at = first
                    for batch in table.iter_batches(size, row_groups=[number], use_threads=False):
                        if at + batch.num_rows > position:
                            yield from _numbered(batch, at, position, end)
                        at += batch.num_rows
                        if end is not None and at >= end:
                            return
                first += group.num_rows


class ArrowStream(_RowStream):
    """The rows of an Arrow IPC file or stream."""

    def __init__(self, file: DataFile) -> None:
        super().__init__(file)
        # behind a URL, counting the rows of a stream would read the whole of it
        self.cut: Literal["rows"] | None = "rows" if file.local is not None else None

    def count(self) -> int:
        """The number of rows."""
        with self.file.open() as content:
            data = _mapped(content)
            data.madvise(mmap.MADV_RANDOM)  # only what tells the sizes of the batches is looked at
            return sum(batch.num_rows for batch in _read_batches(_buffer(data), self.file.name))

    def read(self, position: int, end: int | None = None) -> Iterator[tuple[int, Any]]:
        """The rows from a position on and before `end`."""
        import pyarrow as pa

        with self.file.open() as content:
            # the map is not closed here: it goes with the last batch that lies in it
            data = None if self.file.local is None else _mapped(content)
            source = pa.PythonFile(content, mode="r") if data is None else _buffer(data)
            at = 0
            for batch in _read_batches(source, self.file.name):
                if at + batch.num_rows > position:
                    step = _rows_at_once(batch.num_rows, batch.nbytes)
                    for begin in range(max(position - at, 0), batch.num_rows, step):
                        yield from _numbered(batch.slice(begin, step), at + begin, position, end)
                        if data is not None:
                            data.madvise(mmap.MADV_DONTNEED)  # what was read would count as memory of this process
                at += batch.num_rows
                if end is not None and at >= end:
                    return


def _rows_at_once(rows: int, size: int) -> int:
    """How many rows to decode at once, of so many that have so many bytes."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))


def _numbered(batch: Any, first: int, position: int, end: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a batch, which begins with the row `first`, from a position on and before `end`."""
    begin = max(position - first, 0)
    stop = batch.num_rows if end is None else min(batch.num_rows, end - first)
    if begin < stop:
        yield from enumerate(_rows(batch.slice(begin, stop - begin)), first + begin)


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows as plain values; as samples, one at a time, if they are prepared ones."""
    return decode_rows(table) if is_prepared(table.schema) else iter(table.to_pylist())


def _mapped(content: Any) -> mmap.mmap:
    return mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)


def _buffer(data: mmap.mmap) -> Any:
    import pyarrow as pa

    return pa.BufferReader(pa.py_buffer(data))


def _read_batches(source: Any, name: str) -> Iterator[Any]:
    """The record batches of an IPC file or stream."""
    import pyarrow as pa

    try:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from batches
    except pa.ArrowException as error:
        raise DataError(f"{name} cannot be read as an Arrow file: {first_line(error)}", reason="bad row") from error


def _convert_parquet(file: DataFile) -> Any:
    import datasets

    try:
        with without_progress_bars():
            return datasets.Dataset.from_parquet(str(file.local))
    except Exception as error:  # whatever a damaged column chunk makes of it
        raise DataError(f"{file.name} cannot be read: {first_line(error.__cause__ or error)}") from error
