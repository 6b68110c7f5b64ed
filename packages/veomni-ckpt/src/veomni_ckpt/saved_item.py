"""Where the bytes of a tensor are inside one item of a `.distcp` file: what `torch.save` writes, read without torch.

An item is a zip archive, stored without compression, of a small pickle (element type, shape, strides) and the raw bytes
of the tensor. Two short reads find them: the archive's directory is at its end, the pickle near its beginning.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

from veomni_ckpt.dtypes import BY_STORAGE, DTYPES, Dtype
from veomni_ckpt.pickle_reader import Global, PickleError, PickleReader

Shape = tuple[int, ...]

_HEAD = 1_024
_TAIL = 2_048
_MAX_PICKLE = 65_536
_MAX_DIRECTORY = 2**20


class ItemError(ValueError):
    """The bytes are no tensor that torch.save wrote; the message says why."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in memory order as it was saved.

    Attributes:
        begin: where its storage begins, in bytes from the beginning of the file.
        nbytes: length of the storage.
        strides: in elements, for each dimension; `first` is the element that index 0, 0, ... is.
    """

    dtype: Dtype
    shape: Shape
    strides: Shape
    first: int
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Described:
    """What the pickle says."""

    dtype: Dtype
    shape: Shape
    strides: Shape
    first: int
    key: str


@dataclass(frozen=True, slots=True)
class _Member:
    stored: bool
    size: int
    header: int


# the pickles of a checkpoint's items are few different ones
_Known = dict[bytes, Described]


def locate(descriptor: int, offset: int, length: int, known: _Known) -> StoredTensor:
    """Find the tensor in the item at `offset` of a file.

    Args:
        descriptor: of the open file.
        offset, length: of the item, in bytes; they lie in the file.
        known: pickles that were read before; this call adds to it.

    Raises:
        ItemError: no tensor of torch.save, or of a kind that is not dense and strided.
    """
    item = _Item(descriptor, offset, length)
    members = item.directory()
    by_path = {name.partition("/")[2]: member for name, member in members.items()}
    if "data.pkl" not in by_path:
        raise ItemError("it has no data.pkl")
    if "byteorder" in by_path and item.content(by_path["byteorder"], 16) != b"little":
        raise ItemError("it was saved on a machine with another byte order")
    pickled = item.content(by_path["data.pkl"], _MAX_PICKLE)
    described = known.get(pickled)
    if described is None:
        described = known[pickled] = _describe(pickled)
    data = by_path.get(f"data/{described.key}")
    if data is None or not data.stored:
        raise ItemError("its data is missing or compressed")
    needed = 0
    if 0 not in described.shape:
        last = sum((size - 1) * stride for size, stride in zip(described.shape, described.strides, strict=True))
        needed = (described.first + last + 1) * described.dtype.itemsize
    if needed > data.size:
        raise ItemError(f"its data is {data.size} bytes of {needed}")
    begin = item.begin_of(data) if needed else 0
    return StoredTensor(described.dtype, described.shape, described.strides, described.first, offset + begin, data.size)


class _Item:
    """One zip archive within a file."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length = descriptor, offset, length
        self._head = self._read(0, min(_HEAD, length))

    def _read(self, begin: int, count: int) -> bytes:
        if begin < 0 or count < 0 or begin + count > self._length:
            raise ItemError("it refers to bytes that it does not have")
        data = os.pread(self._descriptor, count, self._offset + begin)
        if len(data) != count:
            raise ItemError("it ends too soon")
        return data

    def _part(self, begin: int, count: int) -> bytes:
        """Bytes near the beginning, of which most are read already."""
        if begin >= 0 and begin + count <= len(self._head):
            return self._head[begin : begin + count]
        return self._read(begin, count)

    def directory(self) -> dict[str, _Member]:
        """The archive's members by name, from the directory at its end."""
        count = min(_TAIL, self._length)
        tail = self._read(self._length - count, count)
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or end + 22 > len(tail):
            raise ItemError("it is no zip archive")
        size, begin = struct.unpack_from("<II", tail, end + 12)
        if 0xFFFFFFFF in (size, begin) or tail[end + 10 : end + 12] == b"\xff\xff":
            if end < 20 or tail[end - 20 : end - 16] != b"PK\x06\x07":
                raise ItemError("it is no zip archive")
            (at,) = struct.unpack_from("<Q", tail, end - 12)
            record = self._read(at, 56)
            if record[:4] != b"PK\x06\x06":
                raise ItemError("it is no zip archive")
            size, begin = struct.unpack_from("<QQ", record, 40)
        if size > _MAX_DIRECTORY:
            raise ItemError("its directory is too long")
        first = self._length - count
        inside = begin >= first and begin + size <= self._length
        return _members(tail[begin - first : begin - first + size] if inside else self._read(begin, size))

    def begin_of(self, member: _Member) -> int:
        """Where the content of a member begins in the item; all of it is in the item."""
        header = self._part(member.header, 30)
        if header[:4] != b"PK\x03\x04":
            raise ItemError("it is no zip archive")
        name, extra = struct.unpack_from("<HH", header, 26)
        begin = member.header + 30 + int(name) + int(extra)
        if begin + member.size > self._length:
            raise ItemError("it refers to bytes that it does not have")
        return begin

    def content(self, member: _Member, limit: int) -> bytes:
        """The bytes of a small member."""
        if not member.stored or member.size > limit:
            raise ItemError("one of its members is compressed or too long")
        return self._part(self.begin_of(member), member.size)


def _members(directory: bytes) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    at = 0
    while at < len(directory):
        if directory[at : at + 4] != b"PK\x01\x02" or at + 46 > len(directory):
            raise ItemError("its directory is damaged")
        (method,) = struct.unpack_from("<H", directory, at + 10)
        packed, size, name_length, extra_length, comment_length = struct.unpack_from("<IIHHH", directory, at + 20)
        (header,) = struct.unpack_from("<I", directory, at + 42)
        name = directory[at + 46 : at + 46 + name_length]
        extra = directory[at + 46 + name_length : at + 46 + name_length + extra_length]
        if 0xFFFFFFFF in (packed, size, header):
            packed, size, header = _long_numbers(extra, packed, size, header)
        stored = method == 0 and packed == size
        members[name.decode("utf-8", "replace")] = _Member(stored, size, header)
        at += 46 + name_length + extra_length + comment_length
    return members


def _long_numbers(extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
    """The zip64 field of a directory entry: 64-bit values for those that are 0xFFFFFFFF, in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = [int(value[0]) for value in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            try:
                size = values.pop(0) if size == 0xFFFFFFFF else size
                packed = values.pop(0) if packed == 0xFFFFFFFF else packed
                header = values.pop(0) if header == 0xFFFFFFFF else header
            except IndexError:
                break
            return packed, size, header
        at += 4 + length
    raise ItemError("its directory is damaged")


def _describe(pickled: bytes) -> Described:
    at = 0

    def read(count: int) -> bytes:
        nonlocal at
        at += count
        return pickled[at - count : at]

    try:
        value = PickleReader(read, len(pickled), _find, _storage).load()
    except PickleError as error:
        raise ItemError(str(error)) from error
    if not isinstance(value, Described):
        raise ItemError("it holds no tensor")
    return value


def _storage(identifier: Any) -> Any:
    """("storage", class, key, device, number of elements) -> (element type or None, key)."""
    if type(identifier) is not tuple or len(identifier) != 5 or identifier[0] != "storage":
        raise PickleError("it has a persistent id that is no storage")
    _, kind, key, _, _ = identifier
    if not isinstance(kind, Global) or type(key) is not str:
        raise PickleError("it has a persistent id that is no storage")
    return (BY_STORAGE.get(kind.name), key)


def _rebuild(arguments: tuple[Any, ...]) -> Described:
    """torch's `_rebuild_tensor_v2`, and `_v3`, which adds the element type."""
    if len(arguments) not in (6, 7):
        raise PickleError("it describes a tensor in another way")
    storage, first, shape, strides = arguments[:4]
    further = arguments[6] if len(arguments) == 7 else None
    if type(storage) is not tuple or len(storage) != 2:
        raise PickleError("it describes a tensor without a storage")
    dtype = further if isinstance(further, Dtype) else storage[0]
    if not isinstance(dtype, Dtype) or (further and not isinstance(further, Dtype)):
        raise PickleError("it describes a tensor of another kind")
    numbers = (first, *(shape if type(shape) is tuple else (-1,)), *(strides if type(strides) is tuple else (-1,)))
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or len(shape) != len(strides):
        raise PickleError("it describes a tensor without a shape")
    return Described(dtype, shape, strides, first, storage[1])


def _empty(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """An OrderedDict without entries: the backward hooks of a tensor."""
    if arguments:
        raise PickleError("it describes a tensor with hooks")
    return {}


def _unwrapped(arguments: tuple[Any, ...]) -> Any:
    """A parameter: (tensor, requires_grad, hooks)."""
    if not arguments or not isinstance(arguments[0], Described):
        raise PickleError("it holds no tensor")
    return arguments[0]


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): Global("_rebuild_tensor_v2", _rebuild),
    ("torch._utils", "_rebuild_tensor_v3"): Global("_rebuild_tensor_v3", _rebuild),
    ("torch._utils", "_rebuild_parameter"): Global("_rebuild_parameter", _unwrapped),
    ("collections", "OrderedDict"): Global("OrderedDict", _empty),
    ("torch.storage", "UntypedStorage"): Global("UntypedStorage"),
    **{("torch", name): Global(name) for name in BY_STORAGE},
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
}


def _find(module: str, name: str) -> Any:
    if (module, name) in _ALLOWED:
        return _ALLOWED[module, name]
    raise PickleError(f"it asks for {module[:80]}.{name[:80]}, which no tensor needs")
