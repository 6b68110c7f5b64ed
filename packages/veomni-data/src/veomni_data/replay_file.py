"""The micro-batches of a step as the bytes of a file."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch

from .collators import Batch
from .errors import DataError


def batches_as_file(batches: Sequence[Batch], suffix: str) -> bytes:
    """The bytes of a file of micro-batches.

    Args:
        suffix: ".safetensors", where the tensor KEY of micro-batch N is called "N.KEY" and a number is a tensor of no
            dimension; or ".pt", the list of dicts, which `torch.load` reads.

    Raises:
        DataError: another suffix.
    """
    if suffix == ".pt":
        buffer = io.BytesIO()
        torch.save(list(batches), buffer)
        return buffer.getvalue()
    if suffix == ".safetensors":
        from safetensors.torch import save

        return save(
            {
                f"{number}.{key}": torch.as_tensor(value).contiguous()
                for number, batch in enumerate(batches)
                for key, value in batch.items()
            }
        )
    raise DataError(f'"{suffix}" is no kind of file for batches: .safetensors and .pt are')
