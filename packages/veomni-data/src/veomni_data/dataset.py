"""Datasets of files: with a length and random access, or as a stream."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol, overload

from .columnar import ArrowIndex, ArrowStream, ParquetIndex, ParquetStream
from .delimited import DELIMITERS, RecordIndex, RecordStream
from .errors import DataError
from .files import DataFile, HubDataset, find_files, first_line, local_copy
from .hub import HubTable, hub_shards
from .json_array import ArrayIndex, ArrayStream, is_array
from .lines import LineIndex, LineStream, parse_json_line, parse_text_line
from .multisource import Interleaved, Mixture, SourceEntry, read_multisource
from .row import Row, rename_columns, transform_row
from .source import IndexedSource, Ref
from .stream import StreamFile, StreamingDataset, StreamSource
from .web_dataset import TarIndex, TarStream

__all__ = ["MappedSource", "MappingDataset", "Row", "build_dataset"]

Transform = Callable[[Row], Any]


class RowFile(Protocol):
    """A file with a length and random access."""

    def __len__(self) -> int: ...

    def values(self, index: int) -> dict[str, Any]:
        """The columns of a row; DataError where it is broken."""
        ...

    def place(self, index: int) -> str:
        """The file and line, row or sample, for messages."""
        ...


class MappedSource(IndexedSource):
    """The rows of files one after the other, with random access, and shuffled by epoch in any number of parts.

    Args:
        files: each with the folder that paths in its rows start from.
        name: of the source.
        number: its place among the sources; they are shuffled apart.
        transform: makes of a row what `encode` gives.
        columns, root, label: see `Row` and `rename_columns`.
    """

    def __init__(
        self,
        files: Sequence[tuple[RowFile, Path | None]],
        *,
        name: str,
        number: int = 0,
        transform: Transform | None = None,
        columns: Mapping[str, str] | None = None,
        root: Path | None = None,
        label: str | None = None,
    ) -> None:
        self.name = name
        self.files = list(files)
        self.transform = transform
        self._columns = columns
        self._root = root
        self._label = label
        self._ends = list(accumulate(len(file) for file, _ in self.files))
        super().__init__(len(self), number)

    def __len__(self) -> int:
        return self._ends[-1]

    def encode(self, raw: Any) -> Any:
        """What the transform makes of a row, or the row; DataError, with file and line, where it is broken."""
        file, folder, index = self._find(raw)
        try:
            values = file.values(index)
            if self._columns is not None:
                values = rename_columns(values, self._columns)
        except DataError as error:
            raise DataError(f"{file.place(index)}: {error}", reason=error.reason) from error
        row = Row(values, file.place(index), folder, self._label, self._root)
        return row if self.transform is None else transform_row(self.transform, row)

    def place(self, ref: Ref) -> str:
        """The file and line, row or sample."""
        file, _, index = self._find(ref)
        return file.place(index)

    def _find(self, index: int) -> tuple[RowFile, Path | None, int]:
        at = bisect.bisect_right(self._ends, index)
        return (*self.files[at], index - (self._ends[at - 1] if at else 0))


class MappingDataset(Sequence[Any]):
    """The rows of sources one after the other, each passed through the transform when it is asked for.

    Iterating it gives the rows in order; of several sources with a mixture, an epoch drawn by its weights, which is a
    function of the seed and the epoch.
    """

    def __init__(self, sources: Sequence[MappedSource], mixture: Mixture | None = None, *, seed: int = 0) -> None:
        self.sources = list(sources)
        self.mixture = mixture
        self.seed = seed
        self.epoch = 0
        self._ends = list(accumulate(len(source) for source in self.sources))

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
        return self.sources[at].encode(index - (self._ends[at - 1] if at else 0))

    def __iter__(self) -> Iterator[Any]:
        if self.mixture is None:
            return map(self.__getitem__, range(len(self)))  # goes on behind a row that raised, as a mixture does
        return Interleaved(self.sources, self.mixture, seed=self.seed, epoch=self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration over a mixture be this epoch."""
        self.epoch = epoch


@overload
def build_dataset(
    path: str | Path | Sequence[str | Path],
    *,
    kind: Literal["mapping"] = ...,
    transform: Transform | None = ...,
    seed: int = ...,
    shuffle_buffer: int = ...,
    root: str | Path | None = ...,
    name: str | None = ...,
    subset: str | None = ...,
    split: str = ...,
) -> MappingDataset: ...
@overload
def build_dataset(
    path: str | Path | Sequence[str | Path],
    *,
    kind: Literal["iterable"],
    transform: Transform | None = ...,
    seed: int = ...,
    shuffle_buffer: int = ...,
    root: str | Path | None = ...,
    name: str | None = ...,
    subset: str | None = ...,
    split: str = ...,
) -> StreamingDataset: ...
@overload
def build_dataset(
    path: str | Path | Sequence[str | Path],
    *,
    kind: str,
    transform: Transform | None = ...,
    seed: int = ...,
    shuffle_buffer: int = ...,
    root: str | Path | None = ...,
    name: str | None = ...,
    subset: str | None = ...,
    split: str = ...,
) -> MappingDataset | StreamingDataset: ...
def build_dataset(
    path: str | Path | Sequence[str | Path],
    *,
    kind: str = "mapping",
    transform: Transform | None = None,
    seed: int = 0,
    shuffle_buffer: int = 256,
    root: str | Path | None = None,
    name: str | None = None,
    subset: str | None = None,
    split: str = "train",
) -> MappingDataset | StreamingDataset:
    """The rows of data files: with a length and random access ("mapping") or as a stream ("iterable").

    | format | a row |
    | --- | --- |
    | `.jsonl`, `.ndjson`, `.json` | an object a line; a `.json` that begins with `[` is an array of objects |
    | `.parquet`, `.arrow` (IPC file or stream) | its columns as plain values, pictures and sound as bytes |
    | `.csv`, `.tsv` | the fields of a record by the header's names, all as text |
    | `.txt` | `{"text": line}` |
    | `.tar` (WebDataset) | `{"__key__": key, suffix: content}`; `.json` is parsed, `.txt` is text, all else is bytes |

    Blank lines are no rows. A stream also reads text formats that end in `.gz` or `.zst`. A stream of a `.json` array
    parses entry by entry; a mapping holds it in memory.

    Args:
        path: a file; a folder (its data files, by name, not those of folders below); a folder of
            `Dataset.save_to_disk`, of `veomni-data prepare`, or laid out as on the hub; a glob (`**` goes below); an
            fsspec URL of any of these (a mapping copies its files into the cache of `datasets`); the id "owner/name" of
            a dataset of the Hugging Face hub; several of these separated by commas or in a list; or a multisource
            `.yaml`, see `read_multisource`.
        kind: "mapping" finds all rows at the start; "iterable" reads nothing before it is iterated.
        transform: makes of a row (a dict with `place`, `folder`, `source`, `root`) what the dataset gives, for example
            a sample or a list of samples; it runs when the row is asked for.
        seed: of the order, with the epoch.
        shuffle_buffer: of a stream: so many rows (but at most 16 MB of them) are read at a time and given in a random
            order, and files are read in a random order; 0 = in the order of the files.
        root: the folder that files named in rows may not leave.
        name: of the source, where it is a single one.
        subset, split: of a hub dataset.

    Raises:
        DataError: nothing there, and for a mapping no row in a file, or a file that cannot be read. A broken row is
            reported when it is asked for.
    """
    if kind not in ("mapping", "iterable"):
        raise DataError(f'kind="{kind}" is not a kind of dataset: "mapping" and "iterable" are')
    if shuffle_buffer < 0:
        raise DataError(f"shuffle_buffer={shuffle_buffer} must be a number of rows, or 0")
    folder = None if root is None else Path(root).expanduser()
    if folder is not None and not folder.is_dir():
        raise DataError(f"the data root {root} is not a folder")
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    if not paths:
        raise DataError("the list of data files is empty")
    entries, mixture, several = [SourceEntry(name or _name_of(paths), "")], None, False
    if any(_is_multisource(p) for p in paths):
        if len(paths) > 1:
            raise DataError("a multisource .yaml stands alone: name the other files among its sources")
        entries, mixture = read_multisource(Path(paths[0]).expanduser(), split)
        several = True
    sources: list[Any] = []
    for number, entry in enumerate(entries):
        files = [file for p in ([entry.path] if several else paths) for file in find_files(p, split)]
        given: dict[str, Any] = {
            "name": entry.name,
            "transform": transform,
            "columns": entry.columns,
            "root": folder,
            "label": entry.name if several or name else None,
        }
        if kind == "mapping":
            sources.append(MappedSource([_index(f, subset, split) for f in files], number=number, **given))
        else:
            sources.append(_stream_source(files, subset, split, shuffle_buffer=shuffle_buffer, **given))
    made = MappingDataset if kind == "mapping" else StreamingDataset
    return made(sources, mixture, seed=seed)


def _is_multisource(path: str | Path) -> bool:
    return str(path).endswith((".yaml", ".yml"))


def _name_of(paths: Sequence[str | Path]) -> str:
    return Path(str(paths[0]).rstrip("/")).name.partition(".")[0] or "data"


def _index(file: DataFile | HubDataset, subset: str | None, split: str) -> tuple[RowFile, Path | None]:
    """A file with random access, and the folder that paths in its rows start from."""
    if isinstance(file, HubDataset):
        table = HubTable(file.name, subset, split)
        if not len(table):
            raise DataError(f"{file.name} is empty: it has no row")
        return table, table.folder
    if file.compression is not None:
        raise DataError(f'{file.name} is compressed and has no random access: unpack it, or use kind="iterable"')
    copy = local_copy(file)
    try:
        indexed = _index_format(copy)
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error.strerror or first_line(error)}") from error
    if not len(indexed):
        raise DataError(f"{file.name} is empty: it has no row")
    return indexed, file.folder


def _index_format(file: DataFile) -> RowFile:
    if file.suffix == ".parquet":
        return ParquetIndex(file)
    if file.suffix == ".arrow":
        return ArrowIndex(file)
    if file.suffix in DELIMITERS:
        return RecordIndex(file)
    if file.suffix == ".tar":
        return TarIndex(file)
    if file.suffix == ".json" and is_array(file):
        return ArrayIndex(file)
    return LineIndex(file, parse_text_line if file.suffix == ".txt" else parse_json_line)


def _stream_source(
    files: Sequence[DataFile | HubDataset], subset: str | None, split: str, **given: Any
) -> StreamSource:
    streams: list[StreamFile] = []
    names: list[str] = []
    folders: list[Path | None] = []
    sizes: list[int | None] = []
    for file in files:
        if isinstance(file, HubDataset):
            shards = hub_shards(file.name, subset, split)
            streams += shards
            names += [file.name] * len(shards)
            folders += [shard.folder for shard in shards]
            sizes += [None] * len(shards)
        else:
            streams.append(_stream_format(file))
            names.append(file.name)
            folders.append(file.folder)
            sizes.append(file.size)
    return StreamSource(streams, names=names, folders=folders, sizes=sizes, **given)


def _stream_format(file: DataFile) -> StreamFile:
    if file.suffix == ".parquet":
        return ParquetStream(file)
    if file.suffix == ".arrow":
        return ArrowStream(file)
    if file.suffix in DELIMITERS:
        return RecordStream(file)
    if file.suffix == ".tar":
        return TarStream(file)
    try:
        if file.suffix == ".json" and is_array(file):
            return ArrayStream(file)
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error.strerror or first_line(error)}") from error
    return LineStream(file, parse_text_line if file.suffix == ".txt" else parse_json_line)
