"""WebDataset shards: tar archives in which the files of a sample follow each other and share a name up to its dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError
from .files import DataFile
from .lines import read_bytes
from .row import checked_values

_BLOCK = 512


class _Member(NamedTuple):
    suffix: str
    begin: int
    size: int


class TarIndex:
    """The samples of an archive on this machine, with random access."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self._stream = TarStream(file)
        try:
            self._positions = np.array([position for position, _ in self._stream.read(0)], np.int64)
        except tarfile.TarError as error:
            raise DataError(f"{file.name} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._positions)

    def values(self, index: int) -> dict[str, Any]:
        """The files of a sample by their suffixes."""
        position = int(self._positions[index])
        _, payload = next(self._stream.read(position))
        return self._stream.values(position, payload)

    def place(self, index: int) -> str:
        """The archive and sample."""
        return self._stream.place(int(self._positions[index]))


class TarStream:
    """The samples of an archive. A position is the byte where the header of a sample's first file begins.

    A sample is `{"__key__": name up to the first dot, suffix: content}`, where `.json` is what it says, `.txt` is text,
    and all else is bytes.
    """

    cut = None
    seekable = True

    def __init__(self, file: DataFile) -> None:
        self.file = file

    def read(self, position: int, end: int | None = None) -> Iterator[tuple[int, Any]]:
        """The samples from a position on.

        Raises:
            DataError, tarfile.TarError: the archive is cut off or damaged; the sample that this befell is not given.
        """
        with self.file.open(position) as content:
            key, begin, members = None, position, list[_Member]()
            for info in _members(content, self.file):
                name = _split(info.name)
                if not info.isfile() or name is None:
                    continue
                if name[0] != key:
                    if key is not None:
                        yield begin, self._payload(key, members, content)
                    key, begin, members = name[0], info.offset, []
                members.append(_Member(name[1], info.offset_data, info.size))
            if key is not None:
                yield begin, self._payload(key, members, content)

    def values(self, position: int, payload: Any) -> dict[str, Any]:
        """The files of a sample by their suffixes."""
        key, members = payload
        values: dict[str, Any] = {"__key__": key}
        for suffix, content in members:
            if suffix in values:
                raise DataError(f'sample {key} has two files ".{suffix}"', reason="bad row")
            data = read_bytes(self.file, *content) if isinstance(content, tuple) else content
            values[suffix] = _decode(data, suffix)
        return checked_values(values)

    def place(self, position: int) -> str:
        """The archive and sample."""
        try:
            return f"{self.file.name}, sample {next(self.read(position))[1][0]}"
        except (OSError, tarfile.TarError, DataError, StopIteration):
            return f"{self.file.name}, byte {position}"

    def quick_place(self, position: int, payload: Any) -> str:
        """The archive and sample."""
        return f"{self.file.name}, sample {payload[0]}"

    def _payload(self, key: str, members: list[_Member], content: Any) -> Any:
        if self.file.local is not None:  # read where it is decoded, so that pictures are not sent to workers
            return key, [(member.suffix, (member.begin, member.size)) for member in members]
        at = content.tell()
        files = []
        for member in members:
            content.seek(member.begin)
            files.append((member.suffix, content.read(member.size)))
        content.seek(at)
        return key, files


def _members(content: Any, file: DataFile) -> Iterator[tarfile.TarInfo]:
    """The headers of an archive from where `content` stands; DataError where it ends without its closing mark."""
    with tarfile.open(fileobj=content, mode="r:") as archive:
        while (info := archive.next()) is not None:
            yield info
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
        # tarfile takes a damaged header, or none, for the end
        content.seek(archive.offset)
        mark = content.read(_BLOCK)
    if mark != bytes(_BLOCK):
        what = "ends without its closing mark: it is cut off" if len(mark) < _BLOCK else "is damaged"
        raise DataError(f"{file.name} {what}", reason="bad row")


def _split(name: str) -> tuple[str, str] | None:
    """The key and the suffix of a file's name; None if it is not one of a sample's."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if stem and dot and not stem.startswith("__") else None


def _decode(data: bytes, suffix: str) -> Any:
    kind = suffix.rpartition(".")[2]
    try:
        if kind == "json":
            return json.loads(data)
        return data.decode() if kind == "txt" else data
    except (ValueError, RecursionError) as error:
        message = f".{suffix} is not {'JSON' if kind == 'json' else 'UTF-8'} ({error})"
        raise DataError(message, reason="bad row") from error
