"""Whether two tensors, of one checkpoint or two, are the same byte by byte."""

from __future__ import annotations

from veomni_ckpt.checkpoint import Checkpoint, Tensor
from veomni_ckpt.tensor_reader import BLOCK, TensorReader


def first_difference(a: Checkpoint, one: Tensor, b: Checkpoint, other: Tensor) -> int | None:
    """The first element, counted in row-major order, in which two tensors of one type and shape differ; or None."""
    first, second = TensorReader(a, one), TensorReader(b, other)
    ours, theirs = memoryview(bytearray(BLOCK)), memoryview(bytearray(BLOCK))
    block = first.block_bytes(BLOCK)
    itemsize = one.dtype.itemsize
    for begin in range(0, first.nbytes, block):
        length = min(block, first.nbytes - begin)
        first.read(begin, begin + length, ours)
        second.read(begin, begin + length, theirs)
        # as bytes: memoryviews compare element by element in slow motion
        left, right = bytes(ours[:length]), bytes(theirs[:length])
        if left != right:
            at = next(number for number in range(length) if left[number] != right[number])
            return (begin + at) // itemsize
    return None


def same_bytes(a: Checkpoint, one: Tensor, b: Checkpoint, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return first_difference(a, one, b, other) is None
