"""Changing the element type of raw tensors, a block at a time, as torch does. The one place that needs numpy always.

Everything goes through float32, as in torch: float64 to bfloat16 rounds twice there too. float32 to bfloat16 rounds to
nearest, ties to even. A NaN becomes the quiet NaN 0x7FC0 in bfloat16; which NaN torch writes differs with its kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veomni_ckpt.dtypes import Dtype

Array = NDArray[Any]

_DIRECT = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}
_NAN = 0x7FC0
_STEP = 65_536  # elements at a time, which stay in the processor's cache from one pass to the next


def to_float32(raw: memoryview, dtype: Dtype) -> Array:
    """A float32 array of the elements in `raw`; for float32 itself a view. Any floating type of `DTYPES`."""
    if dtype.name == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    if dtype.name == "float32":
        return np.frombuffer(raw, "<f4")
    if dtype.name in _DIRECT:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.frombuffer(raw, _DIRECT[dtype.name]).astype("<f4", copy=False)
    return _small_floats(dtype)[np.frombuffer(raw, "u1")]


def to_float64(raw: memoryview, dtype: Dtype) -> Array:
    """A float64 array of the elements in `raw`, exact. Any floating type of `DTYPES`."""
    if dtype.name == "float64":
        return np.frombuffer(raw, "<f8")
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return to_float32(raw, dtype).astype("<f8")


def from_float32(values: Array, dtype: Dtype) -> Array:
    """The elements in another type, as an array whose bytes are theirs (flat, uint16 for bfloat16)."""
    if dtype.name == "bfloat16":
        return round_to_bfloat16(values)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(_DIRECT[dtype.name], copy=False)


def round_to_bfloat16(values: Array, out: Array | None = None, scratch: Array | None = None) -> Array:
    """bfloat16 bits, as a flat array of uint16, of float32 values; nearest, ties to even, NaN is 0x7FC0.

    Args:
        values: contiguous float32.
        out: uint16 of the same number of elements; None: a new one.
        scratch: uint32 of the same number of elements, to be overwritten; None: a new one.
    """
    values = values.reshape(-1)
    bits = values.view("<u4")
    out = np.empty(bits.shape, "<u2") if out is None else out
    rounded = np.right_shift(bits, 16, out=scratch)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    np.copyto(out, rounded, casting="unsafe")
    is_nan = np.isnan(values)
    if is_nan.any():
        out[is_nan] = _NAN
    return out


def caster(source: Dtype, target: Dtype) -> Callable[[memoryview, memoryview], int]:
    """A function that writes the elements of its first argument into the second in another type; gives their bytes.

    It keeps nothing, and may be called by several threads at once.
    """

    def convert(raw: memoryview, out: memoryview) -> int:
        count = len(raw) // source.itemsize
        if target.name == "bfloat16":
            scratch = np.empty(min(count, _STEP), "<u4")
            rounded = np.frombuffer(out, "<u2", count)
            for begin in range(0, count, _STEP):
                end = min(begin + _STEP, count)
                values = to_float32(raw[begin * source.itemsize : end * source.itemsize], source)
                round_to_bfloat16(values, rounded[begin:end], scratch[: end - begin])
        else:
            np.frombuffer(out, _DIRECT[target.name], count)[:] = from_float32(to_float32(raw, source), target)
        return count * target.itemsize

    return convert


def _small_floats(dtype: Dtype) -> Array:
    """The values of all 256 codes of an 8-bit type, from its definition (OCP 8-bit floating point; FNUZ: no -0)."""
    codes = np.arange(256, dtype="i4")
    if dtype.name == "float8_e8m0fnu":
        values = np.full(256, np.nan, "<f4")
        values[:255] = np.ldexp(np.float32(1), codes[:255] - 127)
        return values
    exponent_bits = 4 if "e4m3" in dtype.name else 5
    mantissa_bits = 7 - exponent_bits
    without_zero = dtype.name.endswith("fnuz")
    bias = 2 ** (exponent_bits - 1) - (0 if without_zero else 1)
    exponent = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    magnitude = np.where(exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias))
    values = np.where(codes < 128, magnitude, -magnitude).astype("<f4")
    if without_zero:
        values[0x80] = np.nan
    elif dtype.name == "float8_e4m3fn":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[[0x7C, 0xFC]] = np.inf, -np.inf
        values[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return values
