"""Every element type is converted as torch does; a NaN stays one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from veomni_ckpt.casting import caster, from_float32, to_float32, to_float64
from veomni_ckpt.dtypes import DTYPES, TARGETS, Dtype, target_dtype

SMALL = [dtype for dtype in DTYPES.values() if dtype.is_floating and dtype.itemsize == 1]
FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating]


def raw_bits(dtype: Dtype, count: int) -> torch.Tensor:
    """Random bits, and all those around the limits of the type."""
    generator = torch.Generator().manual_seed(0)
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8)
    random = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    special = [
        0.0,
        -0.0,
        1.0,
        float("inf"),
        -float("inf"),
        float("nan"),
        65_504,
        65_520,
        3.4e38,
        1e-40,
        6e-8,
        2.0**-133,
    ]
    return torch.cat([torch.tensor(special).to(getattr(torch, dtype.name)).view(torch.uint8), random])


@pytest.mark.parametrize("source", FLOATS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("target", TARGETS)
def test_all_bits_convert_as_in_torch(source: Dtype, target: str) -> None:
    raw = raw_bits(source, 200_000)
    count = len(raw) // source.itemsize
    out = memoryview(bytearray(count * DTYPES[target].itemsize))
    assert caster(source, DTYPES[target])(memoryview(raw.numpy()), out) == len(out)
    got = torch.frombuffer(out, dtype=getattr(torch, target))
    # through float32, as torch converts between types of less precision
    expected = raw.view(getattr(torch, source.name)).to(torch.float32).to(getattr(torch, target))
    if source.name == target == "float64":
        expected = raw.view(torch.float64).float().double()
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan].view(torch.uint8), expected[~nan].view(torch.uint8))
    if target == "bfloat16":
        assert set(got[nan].view(torch.uint16).tolist()) <= {0x7FC0, 0xFFC0}
    if target == "bfloat16" and source.name == "float32":
        negative = raw.view(torch.float32)[nan].signbit()
        assert torch.equal(got[nan].signbit(), negative)
        assert negative.any()
        assert not negative.all()


def test_ties_go_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0xFF800000, 0x7F800001], "<u4")
    rounded = from_float32(bits.view("<f4"), DTYPES["bfloat16"]).view("<u2")
    assert rounded.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F80, 0xFF80, 0x7FC0]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_values_are_exact_where_they_are_compared(dtype: Dtype) -> None:
    raw = raw_bits(dtype, 1_000)
    expected = raw.view(getattr(torch, dtype.name)).to(torch.float64)
    got = torch.from_numpy(to_float64(memoryview(raw.numpy()), dtype).copy())
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    if dtype.itemsize < 8:
        single = torch.from_numpy(to_float32(memoryview(raw.numpy()), dtype).copy())
        torch.testing.assert_close(single.double(), expected, rtol=0, atol=0, equal_nan=True)


def test_short_names_and_torchs_are_understood() -> None:
    words = ("bf16", "fp16", "half", "fp32", "float", "fp64", "bfloat16")
    names = [dtype.name for dtype in map(target_dtype, words) if dtype]
    assert names == ["bfloat16", "float16", "float16", "float32", "float32", "float64", "bfloat16"]
    assert target_dtype(None) is None
    with pytest.raises(ValueError, match="dtype='fp8': allowed are"):
        target_dtype("fp8")


def test_the_sizes_and_codes_are_those_of_torch_and_safetensors() -> None:
    from safetensors.torch import _TYPES

    for dtype in DTYPES.values():
        assert getattr(torch, dtype.name).itemsize == dtype.itemsize
        assert getattr(torch, dtype.name).is_floating_point == dtype.is_floating
        if dtype.code in _TYPES:
            assert _TYPES[dtype.code] == getattr(torch, dtype.name)
    assert set(_TYPES) <= {dtype.code for dtype in DTYPES.values()}
