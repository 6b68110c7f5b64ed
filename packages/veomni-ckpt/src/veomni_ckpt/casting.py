"""Changing the element type of raw tensors, as torch does: the one place that needs numpy always, and ml_dtypes.

Everything goes through float32, as in torch: float64 to bfloat16 rounds twice there too. float32 to bfloat16 rounds to
nearest, ties to even. A NaN becomes a quiet one of its sign (0x7FC0 or 0xFFC0 in bfloat16); which one torch writes
differs with its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from veomni_ckpt.dtypes import Dtype

Array = NDArray[Any]


def to_float32(raw: memoryview, dtype: Dtype) -> Array:
    """A float32 array of the elements in `raw`; for float32 itself a view. Any floating type of `DTYPES`."""
    return _cast(np.frombuffer(raw, _numpy_type(dtype)), "float32")


def to_float64(raw: memoryview, dtype: Dtype) -> Array:
    """A float64 array of the elements in `raw`, exact. Any floating type of `DTYPES`."""
    return _cast(np.frombuffer(raw, _numpy_type(dtype)), "float64")


def from_float32(values: Array, dtype: Dtype) -> Array:
    """The elements in another type, as a flat array of their bytes."""
    return _cast(values.reshape(-1), _numpy_type(dtype)).view("u1")


def caster(source: Dtype, target: Dtype) -> Callable[[memoryview, memoryview], int]:
    """A function that writes the elements of its first argument into the second in another type; gives their bytes.

    It keeps nothing, and may be called by several threads at once.
    """
    target_type = _numpy_type(target)

    def convert(raw: memoryview, out: memoryview) -> int:
        count = len(raw) // source.itemsize
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(np.frombuffer(out, target_type, count), to_float32(raw, source), casting="unsafe")
        return count * target.itemsize

    return convert


def _cast(values: Array, target: Any) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # infinities, and signalling NaNs
        return values.astype(target, copy=False)


def _numpy_type(dtype: Dtype) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, dtype.name, dtype.name))
