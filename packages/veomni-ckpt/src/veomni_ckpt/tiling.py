"""Whether boxes cover a tensor: every element once, none twice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]  # offsets and sizes

_MAX_IRREGULAR = 4_096


def volume(shape: Sequence[int]) -> int:
    """Number of elements; exact for numbers of any size."""
    product = 1
    for size in shape:
        product *= size
    return product


def fault_of_tiling(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """What is wrong with boxes that should cover a tensor of this shape exactly; None if nothing is."""
    filled = []
    covered = 0
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"a chunk of {len(sizes)} dimensions where the tensor has {len(shape)}"
        if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
            return f"a chunk at {list(offsets)} of {list(sizes)} reaches beyond the shape {list(shape)}"
        if 0 not in sizes:
            filled.append((offsets, sizes))
            covered += volume(sizes)
    if covered != volume(shape):
        return f"its chunks have {covered} elements where the shape {list(shape)} needs {volume(shape)}"
    if len(filled) > 1 and _overlap(filled, 0):
        return "its chunks overlap"
    return None


def _overlap(boxes: Sequence[Box], dimension: int) -> bool:
    """Whether any two boxes, which meet in all dimensions before this one, have an element in common."""
    if len(boxes) < 2:
        return False
    if dimension == len(boxes[0][0]):
        return True
    groups: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        groups.setdefault((box[0][dimension], box[0][dimension] + box[1][dimension]), []).append(box)
    intervals = sorted(groups)
    if all(first[1] <= second[0] for first, second in pairwise(intervals)):
        return any(_overlap(group, dimension + 1) for group in groups.values())
    if len(boxes) > _MAX_IRREGULAR:
        return True  # no sharding makes so many that interlock; to look closer would take long
    cuts = sorted({end for interval in intervals for end in interval})
    for begin in cuts[:-1]:
        inside = [box for box in boxes if box[0][dimension] <= begin < box[0][dimension] + box[1][dimension]]
        if _overlap(inside, dimension + 1):
            return True
    return False
