"""Headers of safetensors files, read and checked before a byte of data is, and written for tensors to come.

A file is 8 bytes (the length of the header), a JSON object {name: {dtype, shape, data_offsets}} and the tensors one
after the other in row-major order. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veomni_ckpt.dtypes import BY_CODE, Dtype
from veomni_ckpt.errors import DamagedCheckpointError
from veomni_ckpt.tiling import volume

Shape = tuple[int, ...]

MAX_HEADER = 100_000_000  # the limit of the safetensors library
ALIGNMENT = 4_096
# how the files of a model are called by transformers, and by diffusers
STEMS = ("model", "diffusion_pytorch_model")


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor of a file; `begin` is where it begins in the file, in bytes."""

    dtype: Dtype
    shape: Shape
    begin: int
    nbytes: int


@dataclass
class Header:
    """What the beginning of a safetensors file says."""

    tensors: dict[str, HeaderEntry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path, start: int = 0) -> Header:
    """The checked header of a file: names, element types, shapes, and byte ranges that fill the file without overlap.

    Args:
        path: the file.
        start: where its safetensors part begins, in bytes; it reaches to the end.

    Raises:
        DamagedCheckpointError: naming the file, and the tensor where it is one.
    """
    try:
        # not to wait for a pipe that nobody writes to
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedCheckpointError(f"{path} is no file")
            size = status.st_size - start
            length = int.from_bytes(os.pread(descriptor, 8, start), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise DamagedCheckpointError(
                    f"{path} is no whole safetensors file: a header of {length} bytes, a file of {size}"
                )
            raw = os.pread(descriptor, length, start + 8)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from error
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} has a header that is no JSON") from error
    if not isinstance(document, dict):
        raise DamagedCheckpointError(f"{path} has a header that is no JSON object")
    return _check(path, document, start + 8 + length, start + size)


def _check(path: Path, document: dict[str, Any], begin: int, size: int) -> Header:
    header = Header()
    metadata = document.pop("__metadata__", {})
    if isinstance(metadata, dict):
        header.metadata = {key: value for key, value in metadata.items() if isinstance(value, str)}
    ranges: list[tuple[int, int]] = []
    for name, entry in document.items():
        described: dict[str, Any] = entry if isinstance(entry, dict) else {}
        code, shape, place = (described.get(key, ()) for key in ("dtype", "shape", "data_offsets"))
        if not _are_counts(shape) or not _are_counts(place) or len(place) != 2 or len(shape) > 64:
            raise DamagedCheckpointError(f"{path} has a header that does not describe {name[:200]!r} as a tensor")
        dtype = BY_CODE.get(code) if isinstance(code, str) else None
        if dtype is None:
            raise DamagedCheckpointError(f"{path} has {name[:200]!r} in the element type {str(code)[:40]!r}: unknown")
        needed = volume(shape) * dtype.itemsize
        if place[1] - place[0] != needed:
            raise DamagedCheckpointError(
                f"{path} gives {name[:200]!r} {place[1] - place[0]} bytes where its shape {shape} needs {needed}"
            )
        if begin + place[1] > size:
            raise DamagedCheckpointError(
                f"{path} is truncated: {name[:200]!r} ends at {begin + place[1]} of {size} bytes"
            )
        ranges.append((place[0], place[1]))
        header.tensors[name] = HeaderEntry(dtype, tuple(shape), begin + place[0], needed)
    end = 0
    for first, last in sorted(ranges):
        if first != end:
            raise DamagedCheckpointError(f"{path} has tensors that overlap or leave a gap at byte {begin + end}")
        end = last
    if begin + end != size:
        raise DamagedCheckpointError(f"{path} has {size - begin - end} bytes that belong to no tensor")
    return header


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def make_header(
    tensors: Iterable[tuple[str, Dtype, Shape]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file of these tensors, and where each will begin in it.

    Tensors of whole pages come first, behind a header that is filled up with spaces to a whole page: they stay aligned
    for the disk. Of the others, larger element types come first, so that every tensor is aligned to its own.
    """
    listed = [(name, dtype, shape, volume(shape) * dtype.itemsize) for name, dtype, shape in tensors]
    listed.sort(key=lambda tensor: (tensor[3] % ALIGNMENT != 0, -tensor[1].itemsize if tensor[3] % ALIGNMENT else 0))
    document: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begins: dict[str, int] = {}
    end = 0
    for name, dtype, shape, nbytes in listed:
        begins[name] = end
        end += nbytes
        document[name] = {"dtype": dtype.code, "shape": shape, "data_offsets": [begins[name], end]}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}


def file_names(count: int, stem: str = STEMS[0]) -> list[str]:
    """The names that transformers gives to the `count` files of a model; diffusers with another stem."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def index_name(stem: str = STEMS[0]) -> str:
    """The name of the index of several files."""
    return f"{stem}.safetensors.index.json"


def write_index(folder: Path, total_size: int, weight_map: dict[str, str], stem: str = STEMS[0]) -> None:
    """Write the index that says which of several files holds a tensor; `total_size` in bytes."""
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / index_name(stem)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
