"""Datasets of the Hugging Face hub, and folders that are laid out like one, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError
from .files import first_line


class HubTable:
    """The rows of a split, mapped into memory; its files are fetched once."""

    def __init__(self, name: str, subset: str | None, split: str) -> None:
        self.name = name
        self.folder = _folder(name)
        rows = _load(name, subset, split, streaming=False)
        self._rows = rows.flatten_indices() if rows._indices is not None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def values(self, index: int) -> dict[str, Any]:
        """The columns of a row, pictures and sound as their bytes."""
        return self._rows.data.fast_slice(index, 1).to_pylist()[0]

    def place(self, index: int) -> str:
        """The dataset and row."""
        return f"{self.name}, row {index + 1}"


class HubShard:
    """The rows of one file of a split as a stream. A position is a row from 0; those before it are read over."""

    cut = None
    seekable = False
    size = None

    def __init__(self, name: str, rows: Any, number: int) -> None:
        self.name = name
        self.folder = _folder(name)
        self._rows = rows
        self._number = number

    def read(self, position: int, end: int | None = None) -> Iterator[tuple[int, Any]]:
        """The rows from a position on."""
        rows = self._rows.shard(self._rows.num_shards, self._number) if self._rows.num_shards > 1 else self._rows
        yield from enumerate(rows.skip(position), position)

    def values(self, position: int, payload: Any) -> dict[str, Any]:
        """The columns of a row that was read, pictures and sound as their bytes."""
        return dict(payload)

    def place(self, position: int) -> str:
        """The dataset, the file by number, and row."""
        return f"{self.name}, file {self._number + 1} of {self._rows.num_shards}, row {position + 1}"

    def quick_place(self, position: int, payload: Any) -> str:
        """The same."""
        return self.place(position)


def hub_shards(name: str, subset: str | None, split: str) -> list[HubShard]:
    """The files of a split of a dataset, as streams."""
    rows = _load(name, subset, split, streaming=True).decode(False)
    return [HubShard(name, rows, number) for number in range(rows.num_shards)]


def _folder(name: str) -> Path | None:
    return Path(name) if Path(name).is_dir() else None


def _load(name: str, subset: str | None, split: str, *, streaming: bool) -> Any:
    import datasets

    try:
        with without_progress_bars():
            return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:  # the hub cannot be reached, has no such dataset, or it cannot be read
        what = f"{name} cannot be loaded"
        if _folder(name) is None:
            what = f"{name} is no file here and cannot be loaded from the Hugging Face hub"
        raise DataError(f"{what}: {first_line(error)}", reason="missing file") from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Inside, `datasets` shows no progress bars."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
