"""Tensors of safetensors files, fetched by byte ranges: what a rank does not need is not read."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import torch

from veomni_ckpt.checkpoint import Checkpoint, Piece, Tensor
from veomni_ckpt.lazy_tensors import Box, LazyTensor, box_sizes, row_blocks
from veomni_ckpt.local_pieces import within
from veomni_ckpt.tensor_reader import fill

BUFFER = 8 * 2**20
_PAGE = 4_096
_SHORT = 512  # bytes: between shorter ranges it is quicker to read on than to ask again


def stored_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """The tensors of a Hugging Face folder or a safetensors file, by name; the checkpoint is to stay open."""
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        pieces = checkpoint.pieces(name)
        piece = pieces[0] if pieces else Piece((), (), 0, 0)  # without elements: nothing is ever read
        dtype = getattr(torch, tensor.dtype.name)
        tensors[name] = LazyTensor(tensor.shape, dtype, partial(_fetch, checkpoint, tensor, piece))
    return tensors


def _fetch(checkpoint: Checkpoint, tensor: Tensor, piece: Piece, box: Box, out: torch.Tensor) -> None:
    itemsize = tensor.dtype.itemsize
    if not out.numel():
        return
    dtype = getattr(torch, tensor.dtype.name)
    cut = max((dim for dim, size in enumerate(tensor.shape) if box[dim][1] != size), default=-1)
    width = itemsize * math.prod(box_sizes(box[cut:])) if cut >= 0 else 0
    row = itemsize * math.prod(tensor.shape[cut:]) if cut >= 0 else 0
    # a disk reads whole pages, so that leaving out less than one of each row saves nothing
    is_short = cut >= 0 and (width < _SHORT or width + _PAGE >= row)
    if out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous() and not is_short:
        _read(checkpoint, tensor, piece, box, cut, out)
        return
    limit = BUFFER * box[cut][1] // tensor.shape[cut] if is_short else BUFFER
    for block in row_blocks(box, itemsize * math.prod(box_sizes(box)), limit):
        wide = (*block[:cut], (0, tensor.shape[cut]), *block[cut + 1 :]) if is_short else block
        buffer = torch.empty(box_sizes(wide), dtype=dtype)
        _read(checkpoint, tensor, piece, wide, cut, buffer)
        out[within(block, box)] = buffer[within(block, wide)].to(out.device)


def _read(checkpoint: Checkpoint, tensor: Tensor, piece: Piece, box: Box, cut: int, out: torch.Tensor) -> None:
    """Read a box that is whole in all dimensions after `cut` into contiguous memory: a range of bytes for each row."""
    memory = memoryview(out.reshape(-1).view(torch.uint8).numpy())
    strides = [tensor.dtype.itemsize * math.prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape))]
    while cut >= 0 and box[cut] == (0, tensor.shape[cut]):
        cut -= 1
    begin = piece.begin + sum(first * stride for (first, _), stride in zip(box, strides, strict=True))
    length = len(memory) // math.prod(box_sizes(box[: max(cut, 0)]))
    at = 0
    for indices in product(*(range(size) for _, size in box[: max(cut, 0)])):
        source = begin + sum(index * stride for index, stride in zip(indices, strides, strict=False))
        fill(checkpoint, tensor.name, piece.file, [memory[at : at + length]], length, source)
        at += length
