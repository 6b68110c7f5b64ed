"""JSON, JSON lines and Parquet files as a sequence of rows, each of which knows where it comes from."""

from __future__ import annotations

import bisect
import glob
import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from .errors import DataError

_JSON = (".json", ".jsonl", ".ndjson")
_PARQUET = (".parquet",)
_CHUNK = 1 << 24

Array = npt.NDArray[np.int64]


class Row(dict[str, Any]):
    """A row of a data file, as a dict; `place` ("file:line") is for errors, `folder` is what paths in it start from."""

    def __init__(self, values: dict[str, Any], place: str, folder: Path) -> None:
        super().__init__(values)
        self.place = place
        self.folder = folder

    def __reduce__(self) -> tuple[type[Row], tuple[dict[str, Any], str, Path]]:
        return Row, (dict(self), self.place, self.folder)


class _File(Protocol):
    """A data file: a sequence of rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class MappingDataset(Sequence[Any]):
    """The rows of data files one after the other, each passed through `transform` when it is asked for.

    A DataError of the transform is raised again with the row's file and line in front.
    """

    def __init__(self, files: Sequence[_File], transform: Callable[[Row], Any] | None = None) -> None:
        self.files = list(files)
        self.transform = transform
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        at = bisect.bisect_right(self._ends, index)
        row = self.files[at][index - (self._ends[at - 1] if at else 0)]
        if self.transform is None:
            return row
        try:
            return self.transform(row)
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error
        except Exception as error:
            error.add_note(f"while transforming {row.place}")
            raise


def build_dataset(
    path: str | Path | Sequence[str | Path],
    *,
    kind: str = "mapping",
    transform: Callable[[Row], Any] | None = None,
) -> MappingDataset:
    """The rows of JSON, JSON lines and Parquet files, with a length and random access.

    Args:
        path: a file, a folder (its data files, by name, not those of folders below), a glob (`**` goes below), several
            of these separated by commas or in a list. `.json` is an array of objects or, like `.jsonl`, an object
            a line.
        kind: "mapping".
        transform: makes of a row (a dict with `place` and `folder`) what the dataset gives, for example a sample or
            a list of samples; it runs when the row is asked for.

    Raises:
        DataError: nothing there, no row in a file, a file that cannot be read. A line that is not a JSON object is
            reported when it is asked for.
    """
    if kind != "mapping":
        raise DataError(f'kind="{kind}" is not a kind of dataset: "mapping" is')
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    files = [file for p in paths for file in _find(p)]
    return MappingDataset([_open(file) for file in files], transform)


def _find(path: str | Path) -> list[Path]:
    """The data files that a path, a glob or a comma-separated list of both means."""
    whole = Path(path).expanduser()
    if whole.is_dir():
        files = sorted(
            f for f in whole.iterdir() if f.suffix in _JSON + _PARQUET and f.is_file() and f.name[0] not in "._"
        )
        if not files:
            raise DataError(f"{whole} holds no data file ({', '.join(_JSON + _PARQUET)})")
        return files
    if whole.is_file():
        return [whole]
    if "," in str(path):
        return [file for part in str(path).split(",") if part.strip() for file in _find(part.strip())]
    if glob.has_magic(str(path)):
        files = sorted(Path(f) for f in glob.glob(str(whole), recursive=True) if Path(f).is_file())  # noqa: PTH207
        if not files:
            raise DataError(f"no file matches {path}")
        return files
    raise DataError(f"{path} does not exist: it should be a data file or a folder of data files")


def _open(path: Path) -> _File:
    if path.suffix not in _JSON + _PARQUET:
        raise DataError(f"{path} is not a data file: its name must end in one of {', '.join(_JSON + _PARQUET)}")
    try:
        if path.suffix in _PARQUET:
            file: _File = ParquetFile(path)
        else:
            file = JsonArray(path) if _starts_an_array(path) else JsonLines(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not len(file):
        raise DataError(f"{path} is empty: it has no row")
    return file


class JsonLines:
    """An object a line, read by plain `json` through an index of where lines begin.

    Not `datasets`: a column there has one type, and the `content` of a message may be a string in one row and a list
    in the next; nothing is cached that could be stale; and an error can name the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begins, self._ends, self._numbers = _index_lines(path)

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Row:
        begin, end = int(self._begins[index]), int(self._ends[index])
        place = f"{self.path}:{self._numbers[index]}"
        # opened for each row: a handle would be shared by the worker processes, and an open costs less than a parse
        with self.path.open("rb") as file:
            file.seek(begin)
            line = file.read(end - begin)
        try:
            values = json.loads(line.decode("utf-8-sig" if begin == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: this line is not UTF-8 (byte {error.start + 1})") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: this line is not JSON ({error.msg}, column {error.colno})") from error
        return _row(values, place, self.path)


class JsonArray:
    """One array of objects, held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._rows: list[Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 (byte {error.start + 1})") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: this is not JSON ({error.msg}, column {error.colno})") from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return _row(self._rows[index], f"{self.path}, entry {index + 1}", self.path)


class ParquetFile:
    """Rows of a Parquet file: `datasets` converts it once to Arrow, which is mapped into memory for random access.

    Its cache is keyed by the file's time of change and guarded by a lock, so that ranks may start together.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
        from pyarrow import ArrowException

        self.path = path
        try:
            self._length: int = pq.read_metadata(path).num_rows
        except ArrowException as error:
            raise DataError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error
        if self._length:
            self._rows = _load_parquet(path)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return _row(self._rows[index], f"{self.path}, row {index + 1}", self.path)


def _load_parquet(path: Path) -> Any:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # whatever a damaged column chunk makes of it
        raise DataError(f"{path} cannot be read: {str(error.__cause__ or error).splitlines()[0]}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _row(values: Any, place: str, path: Path) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"{place}: a row must be an object with named columns, not a {type(values).__name__}")
    return Row(values, place, path.parent)


def _starts_an_array(path: Path) -> bool:
    """Whether a .json file is an array; a line of JSON lines that is one is an error that JsonLines reports."""
    with path.open("rb") as file:
        return path.suffix == ".json" and file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _index_lines(path: Path) -> tuple[Array, Array, Array]:
    """Where the lines that are not blank begin and end (bytes), and their numbers from 1; int64."""
    size = path.stat().st_size
    if size == 0:
        return (np.zeros(0, np.int64),) * 3
    data = np.memmap(path, np.uint8, mode="r")
    # chunk by chunk, as the comparison makes an array as large as what it is given
    breaks = np.concatenate([np.flatnonzero(data[at : at + _CHUNK] == ord("\n")) + at for at in range(0, size, _CHUNK)])
    begins = np.concatenate([np.zeros(1, np.int64), breaks + 1])
    ends = np.concatenate([breaks, np.array([size], np.int64)])
    keep = ends > begins
    for i in np.flatnonzero(keep)[np.isin(data[begins[keep]], np.frombuffer(b" \t\r", np.uint8))]:
        keep[i] = bool(data[begins[i] : ends[i]].tobytes().strip())
    return begins[keep], ends[keep], np.flatnonzero(keep) + 1
