"""Writing one safetensors file: tensors that are copied, converted, or merged with an adapter, block by block."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from veomni_ckpt.block_writer import BlockWriter, ShortFileError, Slot
from veomni_ckpt.errors import DamagedCheckpointError
from veomni_ckpt.lora import merger
from veomni_ckpt.output_files import Output, OutputFile
from veomni_ckpt.tensor_reader import BLOCK, TensorReader


def write_file(path: Path, file: OutputFile, writer: BlockWriter) -> Iterator[int]:
    """Write one file; gives the number of bytes of each block."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _allocate(descriptor, file.nbytes)
        writer.write_bytes(memoryview(file.head), descriptor, 0)
        yield len(file.head)
        for output in file.outputs:
            at = file.begins[output.name]
            if output.merge is not None:
                blocks = _merged(output, writer, descriptor, at)
            elif output.dtype != output.source.dtype:
                blocks = _converted(output, writer, descriptor, at)
            else:
                blocks = _copied(output, writer, descriptor, at)
            yield from blocks
        writer.finish()
    except ShortFileError as error:
        origin = file.outputs[0].origin.path
        raise DamagedCheckpointError(f"{origin} has become shorter while it was being copied") from error
    finally:
        writer.drain()
        os.close(descriptor)


def _copied(output: Output, writer: BlockWriter, descriptor: int, at: int) -> Iterator[int]:
    reader = TensorReader(output.origin, output.source)
    if ranges := reader.long_ranges():
        for first, length, file, source in ranges:
            for begin in range(0, length, BLOCK):
                size = min(BLOCK, length - begin)
                opened = output.origin.descriptor(file)
                writer.copy_range(opened, source + begin, descriptor, at + first + begin, size)
                yield size
        return
    block = reader.block_bytes(BLOCK)
    for begin in range(0, reader.nbytes, block):
        end = min(begin + block, reader.nbytes)

        def fill(slot: Slot, begin: int = begin, end: int = end) -> int:
            reader.read(begin, end, slot.memory, slot.slices)
            return end - begin

        yield writer.write_block(fill, descriptor, at + begin)


def _converted(output: Output, writer: BlockWriter, descriptor: int, at: int) -> Iterator[int]:
    from veomni_ckpt.casting import caster

    source, target = output.source.dtype, output.dtype
    reader = TensorReader(output.origin, output.source)
    convert = caster(source, target)
    # as many elements as fit in a buffer in either type
    block = reader.block_bytes(BLOCK * source.itemsize // max(source.itemsize, target.itemsize))
    for begin in range(0, reader.nbytes, block):
        end = min(begin + block, reader.nbytes)

        def fill(slot: Slot, begin: int = begin, end: int = end) -> int:
            reader.read(begin, end, slot.memory, slot.slices)
            return end - begin

        writer.write_block(fill, descriptor, at, convert)
        length = (end - begin) // source.itemsize * target.itemsize
        at += length
        yield length


def _merged(output: Output, writer: BlockWriter, descriptor: int, at: int) -> Iterator[int]:
    from veomni_ckpt.casting import from_float32, to_float32

    assert output.merge is not None
    assert output.adapters is not None
    source = output.source
    reader = TensorReader(output.origin, source)
    add = merger(output.adapters, output.merge, source)
    row = source.shape[1] * source.dtype.itemsize
    rows = max(1, BLOCK // row)
    raw = memoryview(bytearray(rows * row))
    for first in range(0, source.shape[0], rows):
        last = min(first + rows, source.shape[0])
        reader.read(first * row, last * row, raw, {})
        values = to_float32(raw[: (last - first) * row], source.dtype).reshape(last - first, source.shape[1])
        data = from_float32(add(first, values), output.dtype).data.cast("B")
        writer.write_bytes(data, descriptor, at)
        at += len(data)
        yield len(data)


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
