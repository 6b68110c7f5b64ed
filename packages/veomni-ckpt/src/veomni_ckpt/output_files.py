"""What a Hugging Face folder will hold, decided before a byte of it is written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from veomni_ckpt.checkpoint import Checkpoint, Tensor
from veomni_ckpt.dtypes import Dtype
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.lora import Merge
from veomni_ckpt.safetensors_files import file_names, make_header
from veomni_ckpt.tiling import volume

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# the parts of an omni model that have a config, and are of use, on their own
_PART = re.compile(r"(foundation|encoders\.[^.]+|decoders\.[^.]+|projectors\.[^.]+)\..+")


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to be written: `source` of `origin` under another name and type; with `merge`, of `adapters`, added."""

    name: str
    origin: Checkpoint
    source: Tensor
    dtype: Dtype
    merge: Merge | None = None
    adapters: Checkpoint | None = None

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return volume(self.source.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be written.

    Attributes:
        path: below the folder.
        head: its first bytes.
        outputs: in the order of the file.
        begins: name -> where the tensor begins, in bytes from the beginning of the file.
    """

    path: Path
    head: bytes
    outputs: list[Output]
    begins: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Length of the whole file."""
        return len(self.head) + sum(output.nbytes for output in self.outputs)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200MB", "1.5GiB" or a number.

    Raises:
        CheckpointError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", str(size).upper())
    number = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if number < 1:
        raise CheckpointError(f'max_shard_size={size!r} is no size: give bytes, or a string such as "5GB"')
    return number


def plan_files(outputs: Iterable[Output], limit: int, below: Path) -> list[OutputFile]:
    """Files for tensors in their order; a new one begins where the next tensor would pass the limit.

    Raises:
        CheckpointError: a tensor has an element type that safetensors has none for.
    """
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if output.dtype.code is None:
            raise CheckpointError(f"{output.name} is {output.dtype.name}, which a safetensors file cannot hold")
        if groups[-1] and filled + output.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.nbytes
    files = []
    for name, group in zip(file_names(len(groups)), groups, strict=True):
        head, begins = make_header((output.name, output.dtype, output.source.shape) for output in group)
        files.append(OutputFile(below / name, head, sorted(group, key=lambda output: begins[output.name]), begins))
    return files


def split_names(names: Iterable[str], parts: bool | Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Folder of each part -> (name, name within the part) of its tensors.

    Args:
        names: own names of the model's tensors.
        parts: False: one part, ""; True: those of an omni model (foundation, each encoder, decoder and projector);
            or folder -> prefix of names. What belongs to none goes to "rest".

    Raises:
        CheckpointError: no part is found, or one that was asked for is empty.
    """
    if parts is False:
        return {"": [(name, name) for name in names]}
    found: dict[str, list[tuple[str, str]]] = {}
    prefixes = {} if parts is True else {folder: prefix.rstrip(".") + "." for folder, prefix in parts.items()}
    for folder in prefixes:
        inside = Path(folder)
        if inside.is_absolute() or not inside.parts or ".." in inside.parts:
            raise CheckpointError(f"the part {folder!r} is no folder below the output")
    for name in names:
        if parts is True:
            match = _PART.fullmatch(name)
            prefix = match[1] + "." if match else ""
            folder = match[1].replace(".", "/") if match else "rest"
        else:
            fitting = [(len(prefix), folder) for folder, prefix in prefixes.items() if name.startswith(prefix)]
            folder = max(fitting)[1] if fitting else "rest"
            prefix = prefixes.get(folder, "") if fitting else ""
        found.setdefault(folder, []).append((name, name[len(prefix) :]))
    missing = [folder for folder in prefixes if folder not in found]
    if missing or not set(found) - {"rest"}:
        what = f"no tensor begins with {prefixes[missing[0]]!r}" if missing else "it has no parts of an omni model"
        raise CheckpointError(f"the model cannot be split: {what}; say FOLDER=PREFIX for each part")
    return found
