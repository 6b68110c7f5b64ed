"""Whether two checkpoints, of any formats, hold the same model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from veomni_ckpt.assets import says_tied
from veomni_ckpt.checkpoint import Checkpoint, Tensor
from veomni_ckpt.errors import CheckpointError
from veomni_ckpt.key_map import model_names
from veomni_ckpt.open_checkpoint import open_checkpoint
from veomni_ckpt.same_bytes import first_difference, same_bytes
from veomni_ckpt.tensor_reader import BLOCK, TensorReader

_FORMATS = {
    **{"float64": "<d", "float32": "<f", "float16": "<e", "int64": "<q", "int32": "<i", "int16": "<h", "int8": "<b"},
    **{"uint64": "<Q", "uint32": "<I", "uint16": "<H", "uint8": "<B", "bool": "<?"},
}


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        equal: there is no difference.
        differences: a sentence for each tensor that differs, the first ones first; at most `limit` are looked for.
        tensors: number of tensors that were compared.
        nbytes: their size.
        scope: "model" (parameters and buffers), or "all tensors" where both are DCP folders with the same names.
        not_compared: items that are no tensors.
    """

    equal: bool
    differences: list[str] = field(default_factory=list)
    tensors: int = 0
    nbytes: int = 0
    scope: str = "model"
    not_compared: list[str] = field(default_factory=list)


def verify(
    a: str | Path,
    b: str | Path,
    *,
    tolerance: float | None = None,
    limit: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare two checkpoints tensor by tensor.

    Args:
        a, b: DCP folders, Hugging Face folders or safetensors files, in any combination. Names are compared as
            `to-hf` would write them; two DCP folders with the same names are compared with their optimizer states.
        tolerance: None: bitwise, element types too. Else floating-point values may differ by tolerance * (1 + |value
            of b|), in any types; NaN equals NaN.
        limit: number of differing tensors after which it stops.
        progress: called with (bytes compared, bytes in all).

    Raises:
        CheckpointError: one of them cannot be read.
    """
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise CheckpointError(f"tolerance={tolerance}: a number of at least 0 is allowed")
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        if set(first.tensors) == set(second.tensors):
            ours = theirs = {name: name for name in first.tensors}
            scope = "all tensors"
        else:
            ours, theirs, scope = model_names(first), model_names(second), "model"
        result = Verification(True, scope=scope, not_compared=sorted({*first.objects, *second.objects}))
        total = sum(first.tensors[source].nbytes for name, source in ours.items() if name in theirs)
        for sentence in _differences(first, ours, second, theirs, tolerance, result):
            if progress is not None:
                progress(result.nbytes, total)
            if sentence is not None:
                result.differences.append(sentence)
                if len(result.differences) >= limit:
                    break
    result.equal = not result.differences
    return result


def _differences(
    first: Checkpoint,
    ours: dict[str, str],
    second: Checkpoint,
    theirs: dict[str, str],
    tolerance: float | None,
    result: Verification,
) -> Iterable[str | None]:
    """A sentence for each tensor that differs, None for each that does not."""
    for name, source in ours.items():
        if name not in theirs:
            if not _is_tied(first, ours, name, second, theirs):
                yield f"{name} is in {first.path} and not in {second.path}"
            continue
        one, other = first.tensors[source], second.tensors[theirs[name]]
        yield _difference(name, first, one, second, other, tolerance)
        result.tensors += 1
        result.nbytes += one.nbytes
    for name in theirs:
        if name not in ours and not _is_tied(second, theirs, name, first, ours):
            yield f"{name} is in {second.path} and not in {first.path}"


def _difference(
    name: str, first: Checkpoint, one: Tensor, second: Checkpoint, other: Tensor, tolerance: float | None
) -> str | None:
    if one.shape != other.shape:
        return f"{name} is {list(one.shape)} in {first.path} and {list(other.shape)} in {second.path}"
    by_value = tolerance is not None and one.dtype.is_floating and other.dtype.is_floating
    if one.dtype != other.dtype and not by_value:
        return f"{name} is {one.dtype.name} in {first.path} and {other.dtype.name} in {second.path}"
    if tolerance is not None and by_value:
        return _beyond_tolerance(name, first, one, second, other, tolerance)
    element = first_difference(first, one, second, other)
    if element is None:
        return None
    values = f"{_value(first, one, element)} in {first.path} and {_value(second, other, element)} in {second.path}"
    return f"{name}{_index(one.shape, element)} is {values}"


def _beyond_tolerance(
    name: str, first: Checkpoint, one: Tensor, second: Checkpoint, other: Tensor, tolerance: float
) -> str | None:
    import numpy as np

    from veomni_ckpt.casting import to_float64

    left, right = TensorReader(first, one), TensorReader(second, other)
    ours, theirs = memoryview(bytearray(BLOCK)), memoryview(bytearray(BLOCK))
    elements = left.nbytes // one.dtype.itemsize
    step = BLOCK // 8
    for begin in range(0, elements, step):
        end = min(begin + step, elements)
        values = []
        for reader, tensor, space in ((left, one, ours), (right, other, theirs)):
            size = tensor.dtype.itemsize
            reader.read(begin * size, end * size, space)
            values.append(to_float64(space[: (end - begin) * size], tensor.dtype))
        a, b = values
        with np.errstate(invalid="ignore"):
            close = (np.abs(a - b) <= tolerance * (1 + np.abs(b))) | (a == b) | (np.isnan(a) & np.isnan(b))
        if not close.all():
            at = int(np.argmin(close))
            place = _index(one.shape, begin + at)
            return f"{name}{place} is {a[at]:.9g} in {first.path} and {b[at]:.9g} in {second.path}"
    return None


def _is_tied(has: Checkpoint, names: dict[str, str], name: str, lacks: Checkpoint, other_names: dict[str, str]) -> bool:
    """Whether a head that one side lacks is, in the other, the embedding that both have, and the config says so."""
    config = lacks.folder() / "config.json"
    if not name.endswith("lm_head.weight") or not config.is_file():
        return False
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    head = has.tensors[names[name]]
    embeddings = [names[key] for key in names if key.endswith("embed_tokens.weight") and key in other_names]
    tied = isinstance(document, dict) and says_tied(document)
    return tied and any(same_bytes(has, head, has, has.tensors[source]) for source in embeddings)


def _index(shape: tuple[int, ...], element: int) -> str:
    """The index of an element, such as [3, 17], of its place in row-major order."""
    index: list[int] = []
    for size in reversed(shape):
        element, last = divmod(element, size)
        index.append(last)
    return str(index[::-1]) if index else ""


def _value(checkpoint: Checkpoint, tensor: Tensor, element: int) -> str:
    """One element as text; its bytes in hexadecimal where Python has no such number."""
    size = tensor.dtype.itemsize
    space = memoryview(bytearray(size))
    TensorReader(checkpoint, tensor).read(element * size, (element + 1) * size, space)
    if tensor.dtype.name in _FORMATS:
        (value,) = struct.unpack(_FORMATS[tensor.dtype.name], space)
        return f"{value:.9g}" if isinstance(value, float) else str(value)
    if tensor.dtype.name == "bfloat16":
        return f"{struct.unpack('<f', bytes(2) + bytes(space))[0]:.9g}"
    return "0x" + bytes(space)[::-1].hex()
