"""The element types of tensors, by their names in torch, in torch's storages and in safetensors files."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """One element type; `code` is its name in a safetensors header, None where that format has none."""

    name: str
    code: str | None
    itemsize: int
    is_floating: bool


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("float64", "F64", 8, True),
        Dtype("float32", "F32", 4, True),
        Dtype("float16", "F16", 2, True),
        Dtype("bfloat16", "BF16", 2, True),
        Dtype("float8_e4m3fn", "F8_E4M3", 1, True),
        Dtype("float8_e4m3fnuz", "F8_E4M3FNUZ", 1, True),
        Dtype("float8_e5m2", "F8_E5M2", 1, True),
        Dtype("float8_e5m2fnuz", "F8_E5M2FNUZ", 1, True),
        Dtype("float8_e8m0fnu", "F8_E8M0", 1, True),
        Dtype("complex64", "C64", 8, False),
        Dtype("complex128", None, 16, False),
        Dtype("int64", "I64", 8, False),
        Dtype("int32", "I32", 4, False),
        Dtype("int16", "I16", 2, False),
        Dtype("int8", "I8", 1, False),
        Dtype("uint64", "U64", 8, False),
        Dtype("uint32", "U32", 4, False),
        Dtype("uint16", "U16", 2, False),
        Dtype("uint8", "U8", 1, False),
        Dtype("bool", "BOOL", 1, False),
    )
}

BY_CODE: dict[str, Dtype] = {dtype.code: dtype for dtype in DTYPES.values() if dtype.code is not None}

# the class that torch.save names for the storage of a tensor
BY_STORAGE: dict[str, Dtype] = {
    "DoubleStorage": DTYPES["float64"],
    "FloatStorage": DTYPES["float32"],
    "HalfStorage": DTYPES["float16"],
    "BFloat16Storage": DTYPES["bfloat16"],
    "ComplexFloatStorage": DTYPES["complex64"],
    "ComplexDoubleStorage": DTYPES["complex128"],
    "LongStorage": DTYPES["int64"],
    "IntStorage": DTYPES["int32"],
    "ShortStorage": DTYPES["int16"],
    "CharStorage": DTYPES["int8"],
    "ByteStorage": DTYPES["uint8"],
    "BoolStorage": DTYPES["bool"],
}

# what tensors can be converted to
TARGETS = ("float64", "float32", "float16", "bfloat16")


def target_dtype(name: str | None) -> Dtype | None:
    """The element type for a user's word: torch's name, or bf16, fp16, fp32, fp64, half, float. None for None.

    Raises:
        ValueError: it is none of these.
    """
    if name is None:
        return None
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
    full = {**short, "fp64": "float64"}.get(name, name)
    if full not in TARGETS:
        raise ValueError(f"dtype={name!r}: allowed are {', '.join(TARGETS)}")
    return DTYPES[full]
