"""What is in a checkpoint, from its tables of contents alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.key_map import model_names
from veomni_ckpt.open_checkpoint import open_checkpoint
from veomni_ckpt.tiling import volume


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One tensor: name, element type, shape, size in bytes, number of chunks; `own_name` if it is the model's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shards: int
    own_name: str | None


@dataclass
class Inspection:
    """What `inspect` found.

    Attributes:
        path: of the checkpoint.
        kind: its format in words.
        tensors: all of them, the optimizer's too.
        objects: names of items that are no tensors: their content is not read.
        extra_state: the trainer's own files beside the tensors.
        files: name and size in bytes of each data file.
        nbytes: of all tensors together.
        parameters: elements of the model's tensors together.
    """

    path: str
    kind: str
    tensors: list[TensorLine]
    objects: list[str]
    extra_state: list[str]
    files: list[tuple[str, int]]
    nbytes: int
    parameters: int

    def to_json(self) -> str:
        """The same as one JSON object."""
        document: dict[str, Any] = {
            "path": self.path,
            "kind": self.kind,
            "parameters": self.parameters,
            "nbytes": self.nbytes,
            "objects": self.objects,
            "extra_state": self.extra_state,
            "files": [{"name": name, "nbytes": nbytes} for name, nbytes in self.files],
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }
        return json.dumps(document, indent=1)


def inspect(path: str | Path) -> Inspection:
    """List a checkpoint of any format: a DCP folder, a Hugging Face folder, a safetensors file.

    Only metadata is read, and the sizes of files are held against it, so that it takes as long for 10 TB as for 1 GB of
    as many tensors.

    Raises:
        CheckpointError: naming the file and the reason.
    """
    with open_checkpoint(path) as checkpoint:
        try:
            own = {source: name for name, source in model_names(checkpoint).items()}
        except CheckpointError:
            own = {}  # an optimizer alone is a checkpoint too
        lines = [
            TensorLine(
                name, tensor.dtype.name, tensor.shape, tensor.nbytes, checkpoint.chunk_count(name), own.get(name)
            )
            for name, tensor in checkpoint.tensors.items()
        ]
        return Inspection(
            str(path),
            checkpoint.kind,
            lines,
            list(checkpoint.objects),
            _extra_state(checkpoint.folder()),
            [(file.name, size) for file, size in zip(checkpoint.files, checkpoint.sizes, strict=True)],
            sum(line.nbytes for line in lines),
            sum(volume(line.shape) for line in lines if line.own_name is not None),
        )


def _extra_state(folder: Path) -> list[str]:
    """Files and folders in which trainers keep loader, scheduler and random state beside a checkpoint."""
    names = sorted(entry.name for entry in folder.iterdir())
    return [name for name in names if name.startswith(("extra_state", "optimizer.", "model.json", "rng", "trainer_"))]


def format_size(nbytes: int) -> str:
    """Bytes as people read them: 1.51 GB."""
    number = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1_000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1_000
    return f"{number:.3g} TB"


def format_inspection(found: Inspection) -> str:
    """Tables for a terminal: tensors, then items that are no tensors, then files and totals."""
    rows = [("tensor", "dtype", "shape", "shards", "size")]
    rows += [
        (
            tensor.name,
            tensor.dtype,
            "[" + ", ".join(map(str, tensor.shape)) + "]",
            str(tensor.shards),
            format_size(tensor.nbytes),
        )
        for tensor in found.tensors
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"{found.path}: {found.kind}", ""]
    for name, dtype, shape, shards, size in rows:
        lines.append(
            f"{name:{widths[0]}}  {dtype:{widths[1]}}  {shape:{widths[2]}}  {shards:>{widths[3]}}  {size:>{widths[4]}}"
        )
    lines.append("")
    if found.objects:
        lines.append(f"not tensors: {', '.join(found.objects)}")
    if found.extra_state:
        lines.append(f"extra state: {', '.join(found.extra_state)}")
    stored = sum(size for _, size in found.files)
    lines.append(
        f"{len(found.tensors)} tensors, {format_size(found.nbytes)}; {found.parameters:,} elements are the model's; "
        f"{len(found.files)} files, {format_size(stored)}"
    )
    by_dtype: dict[str, int] = {}
    for tensor in found.tensors:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.nbytes
    if len(by_dtype) > 1:
        lines.append("by dtype: " + ", ".join(f"{dtype} {format_size(size)}" for dtype, size in by_dtype.items()))
    return "\n".join(lines) + "\n"
