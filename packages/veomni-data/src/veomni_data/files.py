"""Finding and opening the files of a dataset, and the files that its rows name."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from .errors import DataError
from .prepared import read_manifest

LINES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
SUFFIXES = (*LINES, ".parquet", ".arrow", ".tar")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_ENDINGS = f"one of {', '.join(SUFFIXES)} (text formats also with {' or '.join(COMPRESSIONS)} behind)"
# what lies beside data and is named like it
_NO_DATA = {"readme.txt", "license.txt", "dataset_info.json", "dataset_infos.json"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_READ_AHEAD = 1 << 18


def resolve_path(name: str | Path, folder: Path | None, root: Path | None) -> Path:
    """The file that a row names.

    Args:
        name: as it stands in the row; a relative one starts from `folder`, else from `root`, else from where we are.
        folder: the folder of the data file that the row is from, None where that is not on this machine.
        root: the folder that the file must lie in, with `..` and symbolic links followed; None = anywhere.

    Raises:
        DataError: "path outside root", or "missing file" where it is not a file.
    """
    path = Path(folder or root or ".", name)
    try:
        resolved = path.resolve()
        outside = root is not None and not resolved.is_relative_to(root.resolve())
        there = not outside and resolved.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a circle of links, a zero byte
        raise DataError(f"{_shown(path)} cannot be a file: {error}", reason="missing file") from error
    if outside:
        raise DataError(f"{_shown(path)} leads out of the data root {root}", reason="path outside root")
    if not there:
        raise DataError(f"{_shown(path)} does not exist or is not a file", reason="missing file")
    return path if root is None else resolved


def _shown(path: Path) -> str:
    """A path for a message, on one line and not longer than one reads."""
    text = repr(str(path))[1:-1]
    return text if len(text) <= 300 else f"{text[:200]}...{text[-50:]}"


@dataclass(frozen=True)
class DataFile:
    """A data file: on this machine, or behind an fsspec URL.

    Attributes:
        name: its path or URL.
        local: its path on this machine, None behind a URL.
        suffix: what its rows are written in, such as ".jsonl".
        compression: "gzip", "zstd" or None.
        size: bytes as it lies there; None where the file system does not say.
    """

    name: str
    local: Path | None
    suffix: str
    compression: str | None
    size: int | None

    @property
    def folder(self) -> Path | None:
        """Where paths in its rows start from."""
        return None if self.local is None else self.local.parent

    def open(self, position: int = 0) -> BinaryIO:
        """The bytes of its content (unpacked) from a position on; what is packed is read up to there.

        Raises:
            OSError: it cannot be read.
        """
        if self.compression is not None:
            return _unpacked(self._open(), self.compression, position)
        file = self._open()
        file.seek(position)
        return file

    def _open(self) -> BinaryIO:
        if self.local is not None:
            return self.local.open("rb", buffering=_READ_AHEAD)
        import fsspec  # type: ignore[import-untyped]

        system, path = fsspec.core.url_to_fs(self.name)
        return cast(BinaryIO, system.open(path, "rb"))


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub, or a folder that is laid out like one.

    Attributes:
        name: "owner/name" or the folder.
    """

    name: str


def find_files(path: str | Path, split: str = "train") -> list[DataFile | HubDataset]:
    """What a file, a folder, a glob, an fsspec URL, a hub id or a comma-separated list of these means, in order.

    Args:
        path: as for `build_dataset`.
        split: of a `datasets.DatasetDict` that was saved to disk.

    Raises:
        DataError: there is no such thing.
    """
    text = str(path)
    if not text.strip():
        raise DataError('the path of the data is empty: the folder where we are is "."')
    if "://" in text and not text.startswith("file://") and "," not in text:
        return list(_find_remote(text))
    whole = Path(text.removeprefix("file://")).expanduser()
    if whole.is_dir():
        return _find_in_folder(whole, split)
    if whole.is_file():
        return [_local_file(whole)]
    if "," in text:
        return [file for part in text.split(",") if part.strip() for file in find_files(part.strip(), split)]
    if glob.has_magic(text):
        files = sorted(Path(f) for f in glob.glob(str(whole), recursive=True) if Path(f).is_file())  # noqa: PTH207
        if not files:
            raise DataError(f"no file matches {path}", reason="missing file")
        return [_local_file(file) for file in files]
    if _HUB_ID.fullmatch(text) and split_name(text) is None:
        return [HubDataset(text)]
    raise DataError(f"{path} does not exist: it should be a data file or a folder of data files", reason="missing file")


def split_name(name: str) -> tuple[str, str | None] | None:
    """The suffix and the compression that a file's name tells; None if it is not the name of a data file."""
    stem, compression = name.lower(), None
    for ending, kind in COMPRESSIONS.items():
        if stem.endswith(ending):
            stem, compression = stem.removesuffix(ending), kind
    suffix = PurePosixPath(stem).suffix
    return (suffix, compression) if suffix in (LINES if compression else SUFFIXES) else None


def local_copy(file: DataFile) -> DataFile:
    """The file itself if it is on this machine, else a copy in the cache of `datasets`, made anew if it changed.

    Raises:
        DataError: it cannot be fetched.
    """
    if file.local is not None:
        return file
    import datasets
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(file.name)
        key = hashlib.sha256(f"{file.name} {system.ukey(path)}".encode()).hexdigest()[:32]
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "veomni-data" / key
        copy = folder / PurePosixPath(path).name
        if not copy.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            # renamed when whole: ranks may fetch at once, and none may see a part
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
                try:
                    with system.open(path, "rb") as remote:
                        shutil.copyfileobj(remote, part, _READ_AHEAD)
                    Path(part.name).replace(copy)
                except BaseException:
                    Path(part.name).unlink()
                    raise
    except Exception as error:  # each file system has errors of its own
        raise DataError(f"{file.name} cannot be fetched: {first_line(error)}", reason="missing file") from error
    return replace(file, local=copy)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _local_file(path: Path) -> DataFile:
    names = split_name(path.name)
    if names is None:
        raise DataError(f"{path} is not a data file: its name must end in {_ENDINGS}")
    return DataFile(str(path), path, *names, path.stat().st_size)


def _find_in_folder(folder: Path, split: str) -> list[DataFile | HubDataset]:
    """The data files of a folder by name; of folders below none, unless it is laid out as `datasets` knows it."""
    if (folder / "dataset_dict.json").is_file():  # datasets.DatasetDict.save_to_disk
        if not (folder / split).is_dir():
            raise DataError(f'{folder} has no split "{split}"')
        folder = folder / split
    if (folder / "state.json").is_file():  # datasets.Dataset.save_to_disk
        parts = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("_data_files", [])
        return [_local_file(folder / part["filename"]) for part in parts]
    if (prepared := read_manifest(folder)) is not None:
        return [_local_file(folder / part["file"]) for part in prepared["parts"]]
    files = sorted(f for f in folder.iterdir() if _is_data(f.name) and f.is_file())
    if files:
        return [_local_file(file) for file in files]
    if any(_is_data(f.name) for f in folder.glob("*/*")):
        return [HubDataset(str(folder))]
    raise DataError(f"{folder} holds no data file ({_ENDINGS})", reason="missing file")


def _is_data(name: str) -> bool:
    return split_name(name) is not None and name[0] not in "._" and name.lower() not in _NO_DATA


def _find_remote(url: str) -> list[DataFile]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
        elif system.isdir(path):
            entries = system.ls(path, detail=True)
            found = {e["name"]: e for e in entries if _is_data(PurePosixPath(e["name"]).name)}
        else:
            found = {path: system.info(path)}
    except Exception as error:  # each file system has errors of its own, and a protocol may need a package
        raise DataError(f"{url} cannot be read: {first_line(error)}", reason="missing file") from error
    files = []
    for name, entry in sorted(found.items()):
        if entry.get("type", "file") != "file":
            continue
        names = split_name(name)
        if names is None:
            raise DataError(f"{url} is not a data file: its name must end in {_ENDINGS}")
        files.append(DataFile(system.unstrip_protocol(name), None, *names, entry.get("size")))
    if not files:
        raise DataError(f"{url} holds no data file ({_ENDINGS})", reason="missing file")
    return files


def _unpacked(packed: BinaryIO, compression: str, position: int) -> BinaryIO:
    import pyarrow as pa  # type: ignore[import-untyped]

    stream = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), compression)
    file = cast(BinaryIO, io.BufferedReader(stream, _READ_AHEAD))
    while position > 0:
        skipped = len(file.read(min(position, _READ_AHEAD)))
        if not skipped:
            break
        position -= skipped
    return file
