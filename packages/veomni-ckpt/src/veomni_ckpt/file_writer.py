"""Writing one safetensors file: tensors that are copied, converted, or merged with an adapter, block by block."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from veomni_ckpt.block_writer import BlockWriter, Slot, write_at
from veomni_ckpt.lora import merger
from veomni_ckpt.output_files import Output, OutputFile
from veomni_ckpt.tensor_reader import TensorReader

BLOCK = 2**20  # what a conversion needs beside it fits into a processor's own cache too
_JOB = 8  # blocks: handing over a job costs as much as a block


def write_file(path: Path, file: OutputFile, writer: BlockWriter) -> Iterator[int]:
    """Write one file; gives the number of bytes of each block."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _allocate(descriptor, file.nbytes)
        write_at(descriptor, memoryview(file.head), 0)
        yield len(file.head)
        for output in file.outputs:
            put = _put_merged if output.merge is not None else _put
            yield from put(output, writer, descriptor, file.begins[output.name])
        writer.finish()
    finally:
        writer.drain()
        os.close(descriptor)


def _put(output: Output, writer: BlockWriter, descriptor: int, at: int) -> Iterator[int]:
    source, target = output.source.dtype, output.dtype
    reader = TensorReader(output.origin, output.source)
    convert = None
    if source != target:
        from veomni_ckpt.casting import caster

        convert = caster(source, target)

    # as many elements as fit in a buffer in either type
    block = reader.block_bytes(BLOCK * source.itemsize // max(source.itemsize, target.itemsize))

    def write(first: int, last: int, at: int, slot: Slot) -> None:
        for begin in range(first, last, block):
            end = min(begin + block, last)
            reader.read(begin, end, slot.memory, slot.slices)
            data = slot.memory[: end - begin]
            if convert is not None:
                data = slot.converted[: convert(data, slot.converted)]
            write_at(descriptor, data, at)
            at += len(data)

    for first in range(0, reader.nbytes, _JOB * block):
        last = min(first + _JOB * block, reader.nbytes)
        writer.put(partial(write, first, last, at))
        length = (last - first) // source.itemsize * target.itemsize
        at += length
        yield length


def _put_merged(output: Output, writer: BlockWriter, descriptor: int, at: int) -> Iterator[int]:
    from veomni_ckpt.casting import from_float32, to_float32

    assert output.merge is not None
    assert output.adapters is not None
    source = output.source
    reader = TensorReader(output.origin, source)
    add = merger(output.adapters, output.merge, source)
    columns = source.shape[1]
    row = columns * source.dtype.itemsize

    def write(first: int, last: int, slot: Slot) -> None:
        raw = memoryview(bytearray((last - first) * row))
        reader.read(first * row, last * row, raw)
        values = to_float32(raw, source.dtype).reshape(last - first, columns)
        data = from_float32(add(first, values), output.dtype)
        write_at(descriptor, data.data, at + first * columns * output.dtype.itemsize)

    rows = max(1, BLOCK // row)
    for first in range(0, source.shape[0], rows):
        last = min(first + rows, source.shape[0])
        writer.put(partial(write, first, last))
        yield (last - first) * columns * output.dtype.itemsize


def _allocate(descriptor: int, length: int) -> None:
    """Give a file its length, with room on the disk where the file system can: a full disk shows at once."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, length)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, length)
