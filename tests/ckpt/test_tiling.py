"""Boxes cover a tensor exactly, or the fault is found."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from veomni_ckpt.tiling import Box, fault_of_tiling

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """Boxes of any place in a small tensor, often a tiling of it with one box moved."""
    shape = draw(SHAPES)
    if draw(st.booleans()):
        cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
        intervals = [list(itertools.pairwise(cut)) for cut in cuts]
        boxes = [(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in itertools.product(*intervals)]
        if draw(st.booleans()):
            number = draw(st.integers(0, len(boxes) - 1))
            offsets, sizes = boxes[number]
            moved = tuple(draw(st.integers(0, whole - size)) for whole, size in zip(shape, sizes, strict=True))
            boxes[number] = (moved, sizes)
        return shape, draw(st.permutations(boxes))
    count = draw(st.integers(0, 4))
    made = []
    for _ in range(count):
        offsets = tuple(draw(st.integers(0, size)) for size in shape)
        made.append((offsets, tuple(draw(st.integers(0, size)) for size in shape)))
    return shape, made


@given(boxes_in())
def test_it_agrees_with_counting_every_element(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    counts = np.zeros([2 * size for size in shape], dtype=int)
    for offsets, sizes in boxes:
        counts[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    inside = tuple(slice(0, size) for size in shape)
    beyond = any(o + s > whole for box in boxes for o, s, whole in zip(*box, shape, strict=True))
    exact = bool((counts[inside] == 1).all()) and not beyond
    assert (fault_of_tiling(shape, boxes) is None) == exact


def test_many_interlocking_boxes_end_soon() -> None:
    """Each overlaps the next: a search of all pairs and cuts would take minutes."""
    boxes: list[Box] = [((number, 0), (2, 1)) for number in range(50_000)]
    assert fault_of_tiling((50_001, 2), [*boxes, ((0, 1), (2, 1))]) is not None
