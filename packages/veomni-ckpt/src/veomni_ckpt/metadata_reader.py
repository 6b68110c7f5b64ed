"""What a DCP `.metadata` file says, read without torch and without trusting it.

The file is a pickle with one record for each chunk of a tensor and one for each place where a chunk is stored: for a
large model on many ranks millions of them. Both kinds are recognized as a whole by the bytes that a pickler writes for
them, and kept as plain numbers; whatever does not look so goes through the reader's opcodes, with the same result.
"""

from __future__ import annotations

import io
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veomni_ckpt.dtypes import DTYPES, Dtype
from veomni_ckpt.errors import DamagedCheckpointError
from veomni_ckpt.metadata_records import (
    ANY_CHUNK,
    ANY_PLACE,
    NUMBERS,
    chunk_pattern,
    number_of,
    place_pattern,
    reference_of,
)
from veomni_ckpt.pickle_reader import MAX_STACK, UNREAD, Global, Instance, PickleError, PickleReader

Shape = tuple[int, ...]
Chunk = tuple[Shape, Shape]  # offsets and sizes of a box of the tensor

MAX_DIMENSIONS = 64
_CACHE_LIMIT = 100_000


@dataclass(slots=True)
class TensorEntry:
    """A tensor of the checkpoint: its element type, its whole shape, and the boxes that it was saved in."""

    dtype: Dtype
    shape: Shape
    chunks: list[Chunk]


@dataclass(slots=True)
class Places:
    """Where the chunks of one name are stored; row i is `rows[3 * i : 3 * i + 3]`: file number, offset, length."""

    offsets: list[Shape | None] = field(default_factory=list)
    rows: array[int] = field(default_factory=lambda: array("q"))

    def __iter__(self) -> Iterator[tuple[Shape | None, int, int, int]]:
        rows = self.rows
        for number, offsets in enumerate(self.offsets):
            yield offsets, rows[3 * number], rows[3 * number + 1], rows[3 * number + 2]


@dataclass
class DcpMetadata:
    """The table of contents of a DCP folder.

    Attributes:
        path: the file that was read.
        tensors: by name.
        objects: names of the items that are no tensors.
        paths: name -> keys and indices that lead to it in the nested state dict; empty where the planner kept none.
        files: names of data files, below the folder.
        places: name -> where its chunks are; `files` gives a file number its name.
        transforms: (name, offsets) -> what its stored bytes went through, such as "stream.zstd/1".
    """

    path: Path
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    places: dict[str, Places] = field(default_factory=dict)
    transforms: dict[tuple[str, Shape | None], tuple[str, ...]] = field(default_factory=dict)


def read_dcp_metadata(path: Path) -> DcpMetadata:
    """Read a `.metadata` file (or a rank's own `__N.metadata`).

    Raises:
        DamagedCheckpointError: the file is missing, truncated, or says anything that DCP does not write.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return _Reader(path, stream.read, size).read_all()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{path.parent} has no {path.name} file: it is not a whole DCP checkpoint"
        ) from error
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except PickleError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error})") from error


def parse_dcp_metadata(path: Path, data: bytes) -> DcpMetadata:
    """The same from the file's bytes; `path` is for the messages.

    Raises:
        DamagedCheckpointError: it says anything that DCP does not write.
    """
    try:
        return _Reader(path, io.BytesIO(data).read, len(data)).read_all()
    except PickleError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error})") from error


def _size(arguments: tuple[Any, ...]) -> Shape:
    if len(arguments) != 1 or not _is_shape(arguments[0]):
        raise PickleError("it has a shape that is none")
    shape: Shape = arguments[0]
    return shape


def _is_shape(value: Any) -> bool:
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(number) is int and 0 <= number < 2**63 for number in value)


def _nothing(arguments: tuple[Any, ...]) -> None:
    """A value that says nothing about the tensors: a layout, a memory format."""


def _path(arguments: tuple[Any, ...]) -> str:
    if len(arguments) > 256 or not all(type(part) is str for part in arguments):
        raise PickleError("it has a path that is none")
    return "/".join(arguments)


_METADATA = Global("Metadata")
_TENSOR = Global("TensorStorageMetadata")
_BYTES = Global("BytesStorageMetadata")
_CHUNK = Global("ChunkStorageMetadata")
_PROPERTIES = Global("TensorProperties")
_INDEX = Global("MetadataIndex")
_STORAGE_INFO = Global("_StorageInfo")
_STORAGE_META = Global("StorageMeta")
_SIZE = Global("torch.Size", _size)
_IGNORED = Global("_get_layout", _nothing)
_PATH = Global("PosixPath", _path)

_MODULE = "torch.distributed.checkpoint.metadata"
_OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"  # before torch 2.3
_ALLOWED: dict[tuple[str, str], Any] = {
    (_MODULE, "Metadata"): _METADATA,
    (_MODULE, "TensorStorageMetadata"): _TENSOR,
    (_MODULE, "BytesStorageMetadata"): _BYTES,
    (_MODULE, "ChunkStorageMetadata"): _CHUNK,
    (_MODULE, "TensorProperties"): _PROPERTIES,
    (_MODULE, "MetadataIndex"): _INDEX,
    (_MODULE, "StorageMeta"): _STORAGE_META,
    (_MODULE, "_MEM_FORMAT_ENCODING"): _IGNORED,
    (_OLD_MODULE, "TensorProperties"): _PROPERTIES,
    (_OLD_MODULE, "MEM_FORMAT_ENCODING"): _IGNORED,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _STORAGE_INFO,
    ("torch", "Size"): _SIZE,
    ("torch.serialization", "_get_layout"): _IGNORED,
    # where the checkpoint was once saved; the class moved in Python 3.13
    ("pathlib", "PosixPath"): _PATH,
    ("pathlib._local", "PosixPath"): _PATH,
    ("pathlib", "WindowsPath"): _PATH,
    ("pathlib._local", "WindowsPath"): _PATH,
} | {("torch", name): dtype for name, dtype in DTYPES.items()}


def _find(module: str, name: str) -> Any:
    if (module, name) in _ALLOWED:
        return _ALLOWED[module, name]
    raise PickleError(f"it asks for {module[:80]}.{name[:80]}, which no checkpoint needs")


_CHUNK_GETS = (_CHUNK, "offsets", "sizes", _SIZE)
_PLACE_GETS = (_INDEX, "fqn", "index", "offset", _SIZE, _STORAGE_INFO, "relative_path", "length")


class _Reader(PickleReader):
    """Reads a `.metadata` pickle into a `DcpMetadata`."""

    def __init__(self, path: Path, read: Any, size: int) -> None:
        super().__init__(read, size, _find)
        self._path = path
        self._result = DcpMetadata(path)
        self._chunk_record: re.Pattern[bytes] | None = None
        self._place_record: re.Pattern[bytes] | None = None
        # the bytes of a record say all of it, as a stored value never changes its number
        self._chunk_cache: dict[bytes, tuple[Chunk, tuple[Any, ...]]] = {}
        self._shape_cache: dict[bytes, tuple[Shape, tuple[Any, ...]]] = {}
        self._names: dict[bytes, str] = {}
        self._file_numbers: dict[str, int] = {}

    def read_all(self) -> DcpMetadata:
        """The whole file, checked for sense."""
        root = self.load()
        if not isinstance(root, Instance) or root.kind is not _METADATA or not isinstance(root.state, dict):
            kind = root.kind.name if isinstance(root, Instance) else type(root).__name__
            raise DamagedCheckpointError(f"{self._path} holds a {kind} where DCP's Metadata belongs")
        entries, places = root.state.get("state_dict_metadata"), root.state.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(places, dict | None):
            raise PickleError("it has no table of tensors")
        for name, entry in entries.items():
            self._take_entry(name, entry)
        for key, info in (places or {}).items():
            self._take_place(key, info)
        planner = root.state.get("planner_data")
        for name, path in planner.items() if isinstance(planner, dict) else ():
            if type(path) is tuple and all(type(part) in (str, int) for part in path):
                self._result.paths[name] = path
        return self._result

    def _take_entry(self, name: Any, entry: Any) -> None:
        if type(name) is not str or not isinstance(entry, Instance):
            raise PickleError("it has no table of tensors")
        if entry.kind is _BYTES:
            self._result.objects.append(name)
            return
        state = entry.state if isinstance(entry.state, dict) else {}
        properties, chunks = state.get("properties"), state.get("chunks")
        shape: Any = state.get("size")
        if entry.kind is not _TENSOR or not _is_shape(shape) or not isinstance(chunks, list):
            raise PickleError(f"it does not describe {name[:200]!r} as a tensor")
        described = properties.state if isinstance(properties, Instance) else None
        dtype = described.get("dtype") if isinstance(described, dict) else described[0] if described else None
        if not isinstance(dtype, Dtype):
            raise PickleError(f"it says no element type for {name[:200]!r}")
        for number, chunk in enumerate(chunks):
            if isinstance(chunk, Instance):
                box = chunk.state if isinstance(chunk.state, dict) else {}
                chunks[number] = chunk = (box.get("offsets"), box.get("sizes"))
                if not _is_shape(chunk[0]) or not _is_shape(chunk[1]):
                    raise PickleError(f"it has a chunk of {name[:200]!r} without a place")
            elif type(chunk) is not tuple:
                raise PickleError(f"it has a chunk of {name[:200]!r} that is none")
        self._result.tensors[name] = TensorEntry(dtype, shape, chunks)

    def _take_place(self, key: Any, info: Any) -> None:
        where = key.state if isinstance(key, Instance) and key.kind is _INDEX else None
        what = info.state if isinstance(info, Instance) and info.kind is _STORAGE_INFO else None
        if not isinstance(where, dict) or not isinstance(what, dict):
            raise PickleError("it has a table of places that is none")
        name, offsets = where.get("fqn"), where.get("offset")
        file: Any = what.get("relative_path")
        offset: Any = what.get("offset")
        length: Any = what.get("length")
        if type(name) is not str or type(file) is not str or not (offsets is None or _is_shape(offsets)):
            raise PickleError("it has a place without a name")
        if not _is_shape((offset, length)):
            raise PickleError(f"it has a place of {name[:200]!r} without an offset")
        self._add_place(name, offsets, file, offset, length)
        transforms = what.get("transform_descriptors")
        if transforms:
            if not isinstance(transforms, list | tuple) or not all(type(text) is str for text in transforms):
                raise PickleError(f"it has a transformation of {name[:200]!r} without a name")
            self._result.transforms[name, offsets] = tuple(transforms)

    def _add_place(self, name: str, offsets: Shape | None, file: str, offset: int, length: int) -> None:
        number = self._file_numbers.get(file)
        if number is None:
            number = self._file_numbers[file] = len(self._result.files)
            self._result.files.append(file)
        places = self._result.places.get(name)
        if places is None:
            places = self._result.places[name] = Places()
        places.offsets.append(offsets)
        places.rows.extend((number, offset, length))

    def _get(self, index: int, begin: int) -> None:
        value = self._recall(index)
        if not (value is _CHUNK and self._read_chunks(begin)) and not (value is _INDEX and self._read_places(begin)):
            self._stack.append(value)

    def _read_chunks(self, begin: int) -> bool:
        """Push the chunks whose records follow one another from `begin` on; False if none has the known form."""
        pattern = self._chunk_record = self._chunk_record or self._learn(ANY_CHUNK, begin, chunk_pattern, _CHUNK_GETS)
        if pattern is None:
            return False
        data, memo, stack, cache, at = self._data, self._memo, self._stack, self._chunk_cache, begin
        while at <= self._low and (match := pattern.match(data, at)):
            record = match.group()
            known = cache.get(record)
            if known is None:
                offsets, of_offsets = self._shape(match[1])
                sizes, of_sizes = self._shape(match[2])
                chunk = (offsets, sizes)
                self._containers_left -= 5
                known = chunk, (chunk, UNREAD, *of_offsets, *of_sizes)
                if len(cache) >= _CACHE_LIMIT:
                    cache.clear()
                cache[record] = known
            stack.append(known[0])
            memo.extend(known[1])
            at = match.end()
            if len(stack) > MAX_STACK:
                break
        self._at = max(self._at, at)
        return at > begin

    def _read_places(self, begin: int) -> bool:
        """Note the places whose records follow one another from `begin` on; False if none has the known form."""
        pattern = self._place_record = self._place_record or self._learn(ANY_PLACE, begin, place_pattern, _PLACE_GETS)
        if pattern is None:
            return False
        data, memo, low, at = self._data, self._memo, self._low, begin
        names, shapes, read_shape, add_place = self._names, self._shape_cache, self._shape, self._add_place
        last_file, file, last_length, length = b"", None, b"", 0
        while at <= low and (match := pattern.match(data, at)):
            raw_name, raw_offsets, raw_file, raw_offset, raw_length = match.groups()
            name = names.get(raw_name) or self._text(raw_name)
            if raw_file != last_file:  # ranks come one after the other
                last_file, file = raw_file, self._text(raw_file)
            if name is None or file is None:
                break
            if raw_length != last_length:
                last_length, length = raw_length, number_of(raw_length)
            offsets, of_offsets = shapes.get(raw_offsets) or read_shape(raw_offsets)
            offset = number_of(raw_offset)
            if offset < 0 or length < 0:
                raise PickleError(f"it has a place of {name[:200]!r} without an offset")
            new_name = (name,) if raw_name[0] == 0x8C else ()
            new_file = (file,) if raw_file[0] == 0x8C else ()
            memo += (UNREAD, UNREAD, *new_name, *of_offsets, UNREAD, UNREAD, *new_file)
            add_place(name, offsets, file, offset, length)
            at = match.end()
        self._at = max(self._at, at)
        return at > begin

    def _learn(
        self, general: re.Pattern[bytes], begin: int, make: Any, expected: tuple[Any, ...]
    ) -> re.Pattern[bytes] | None:
        """The exact pattern of this file's records, from the first of them; None if it is not of the known form."""
        match = general.match(self._data, begin)
        if match is None:
            return None
        gets = [match[f"g{number}"] for number in range(len(expected))]
        if None in gets or any(
            self._recall(reference_of(get)) != value for get, value in zip(gets, expected, strict=True)
        ):
            return None
        return make(tuple(re.escape(get) for get in gets))

    def _shape(self, raw: bytes) -> tuple[Shape, tuple[Any, ...]]:
        """A shape and what recording it adds to the memo, from a match of `_shape_pattern`."""
        known = self._shape_cache.get(raw)
        if known is not None:
            return known
        begin = 2 if raw[0] == 0x68 else 5
        if len(raw) == begin:
            shape = self._recall(reference_of(raw))
            if not _is_shape(shape):
                raise PickleError("it has a shape that is none")
            known = shape, ()
        else:
            body = raw[begin:-4]
            shape = _size((tuple(number_of(found[0]) for found in NUMBERS.finditer(body)),))
            known = shape, (UNREAD, shape) if body == b")" else (shape, UNREAD, shape)
        self._containers_left -= 2
        if self._containers_left < 0:
            raise PickleError("it builds more than a file of its size can describe")
        if len(self._shape_cache) >= _CACHE_LIMIT:
            self._shape_cache.clear()
        self._shape_cache[raw] = known
        return known

    def _text(self, raw: bytes) -> str | None:
        """A text from a match of `_TEXT`; None if the match went past or short of its end."""
        if raw[0] != 0x8C:
            value = self._recall(reference_of(raw))
            return value if type(value) is str else None
        known = self._names.get(raw)
        if known is None and raw[1] == len(raw) - 3:
            try:
                known = self._names[raw] = raw[2:-1].decode()
            except UnicodeDecodeError:
                return None
        return known
