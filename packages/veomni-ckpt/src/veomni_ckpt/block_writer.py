"""Writing blocks, converting or copying them, while the next ones are being read: a few buffers and two threads.

The threads spend their time in the kernel and in numpy, where Python's lock is not held.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from queue import SimpleQueue
from types import TracebackType

# (bytes that were read, where to put what they become) -> length of that
Convert = Callable[[memoryview, memoryview], int]

_THREADS = 2
# what copy_file_range answers between, or on, file systems that it does not know
_NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclass
class Slot:
    """A buffer of whole pages to fill; `slices` is for what `TensorReader` keeps about it."""

    memory: memoryview
    slices: dict[tuple[int, ...], list[memoryview]] = field(default_factory=dict)

    @cached_property
    def converted(self) -> memoryview:
        """A second buffer of the same length, made when it is needed."""
        return memoryview(mmap.mmap(-1, len(self.memory)))


@dataclass(frozen=True)
class _Block:
    slot: Slot
    length: int
    descriptor: int
    at: int
    convert: Convert | None


@dataclass(frozen=True)
class _Range:
    """Bytes of one file to be copied to another; `source` is an open descriptor of its own."""

    slot: Slot
    length: int
    source: int
    begin: int
    descriptor: int
    at: int


class ShortFileError(Exception):
    """A file ended before the range that was to be copied from it."""


class BlockWriter:
    """Writes blocks, and copies ranges, in the background; used in `with`, by one thread."""

    def __init__(self, block: int) -> None:
        """`block`: length of a buffer in bytes."""
        self._free: SimpleQueue[Slot] = SimpleQueue()
        self._todo: SimpleQueue[_Block | _Range | None] = SimpleQueue()
        self._slots = _THREADS + 1
        for _ in range(self._slots):
            self._free.put(Slot(memoryview(mmap.mmap(-1, block))))
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, name="veomni-ckpt", daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()

    def write_block(self, fill: Callable[[Slot], int], descriptor: int, at: int, convert: Convert | None = None) -> int:
        """Have `fill` fill a buffer, and write as many bytes of it as it says to a file, at byte `at`, some time soon.

        Args:
            fill: called here and now; gives a number of bytes, which this gives too.
            descriptor: of a file that stays open until `drain`.
            at: byte of the file.
            convert: called in the background; what it makes of the bytes is written instead, and fits in a buffer.

        Raises:
            Exception: what went wrong with a block that was given before.
        """
        slot = self._free.get()
        length = 0
        try:
            if self._error is not None:
                raise self._error
            length = fill(slot)
        finally:
            self._todo.put(_Block(slot, length, descriptor, at, convert))
        return length

    def copy_range(self, source: int, begin: int, descriptor: int, at: int, length: int) -> None:
        """Copy bytes from file to file some time soon, within the kernel if it can.

        Args:
            source: descriptor of the file to copy from; it may be closed after the call.
            begin, at: where the bytes are in it, and where they go in the other.
            descriptor: as in `write_block`.

        Raises:
            ShortFileError: here or later; `source` is shorter.
            Exception: what went wrong with a block that was given before.
        """
        slot = self._free.get()
        try:
            if self._error is not None:
                raise self._error
            own = os.dup(source)
        except BaseException:
            self._free.put(slot)
            raise
        self._todo.put(_Range(slot, length, own, begin, descriptor, at))

    def write_bytes(self, data: memoryview, descriptor: int, at: int) -> None:
        """Write bytes of any length through the buffers."""
        begin = 0

        def fill(slot: Slot) -> int:
            length = min(len(slot.memory), len(data) - begin)
            slot.memory[:length] = data[begin : begin + length]
            return length

        while begin < len(data):
            begin += self.write_block(fill, descriptor, at + begin)

    def drain(self) -> None:
        """Return when nothing is left to write, so that files may be closed; errors are told by `finish`."""
        slots = [self._free.get() for _ in range(self._slots)]
        for slot in slots:
            self._free.put(slot)

    def finish(self) -> None:
        """Return when all that was given is written.

        Raises:
            Exception: what went wrong with one of the blocks.
        """
        self.drain()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (block := self._todo.get()) is not None:
            try:
                if isinstance(block, _Range):
                    _copy(block, skip=self._error is not None)
                elif self._error is None and block.length:
                    _write(block)
            except BaseException as error:  # told to the thread that waits
                self._error = error
            self._free.put(block.slot)


def _write(block: _Block) -> None:
    data = block.slot.memory[: block.length]
    if block.convert is not None:
        data = block.slot.converted[: block.convert(data, block.slot.converted)]
    done = 0
    while done < len(data):
        done += os.pwrite(block.descriptor, data[done:], block.at + done)


def _copy(block: _Range, *, skip: bool) -> None:
    try:
        done = block.length if skip else _copy_in_kernel(block)
        while done < block.length:
            part = block.slot.memory[: block.length - done]
            count = os.preadv(block.source, [part], block.begin + done)
            if count == 0:
                raise ShortFileError
            written = 0
            while written < count:
                written += os.pwrite(block.descriptor, part[written:count], block.at + done + written)
            done += count
    finally:
        os.close(block.source)


def _copy_in_kernel(block: _Range) -> int:
    """The number of bytes that were copied so: fewer than asked for where the system or the file system cannot."""
    done = 0
    if hasattr(os, "copy_file_range"):
        try:
            while done < block.length:
                count = os.copy_file_range(
                    block.source, block.descriptor, block.length - done, block.begin + done, block.at + done
                )
                if count == 0:
                    break
                done += count
        except OSError as error:
            if error.errno not in _NOT_IN_KERNEL:
                raise
    return done
