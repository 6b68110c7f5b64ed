"""Threads that each read a block of a tensor, change it if need be, and write it, in a buffer of their own.

So a block stays in the cache of one processor on its way from file to file. The threads spend their time in the kernel
and in numpy, where Python's lock is not held.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from queue import Queue
from types import TracebackType

_THREADS = 2
_WAITING = 16  # jobs that may wait for a thread


@dataclass
class Slot:
    """A thread's buffer of whole pages; `slices` is for what `TensorReader` keeps about it."""

    memory: memoryview
    slices: dict[tuple[int, ...], list[memoryview]] = field(default_factory=dict)

    @cached_property
    def converted(self) -> memoryview:
        """A second buffer of the same length, made when it is needed."""
        return memoryview(mmap.mmap(-1, len(self.memory)))


Job = Callable[[Slot], None]


class BlockWriter:
    """Does jobs in the background, in no certain order; used in `with`, by one thread."""

    def __init__(self, block: int) -> None:
        """`block`: length of a buffer in bytes."""
        self._jobs: Queue[Job | None] = Queue(_WAITING)
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(block,), name="veomni-ckpt", daemon=True) for _ in range(_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def put(self, job: Job) -> None:
        """Have `job` called some time soon, in another thread, with a buffer that is its own meanwhile.

        Raises:
            BaseException: what went wrong with a job that was given before.
        """
        if self._error is not None:
            raise self._error
        self._jobs.put(job)

    def drain(self) -> None:
        """Return when no job is left, so that files may be closed; errors are told by `finish`."""
        self._jobs.join()

    def finish(self) -> None:
        """Return when all jobs are done.

        Raises:
            BaseException: what went wrong with one of them; those after it were left out.
        """
        self.drain()
        if self._error is not None:
            raise self._error

    def _work(self, block: int) -> None:
        slot = Slot(memoryview(mmap.mmap(-1, block)))
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    job(slot)
            except BaseException as error:  # told to the thread that waits
                self._error = error
            self._jobs.task_done()


def write_at(descriptor: int, data: memoryview, at: int) -> None:
    """Write all of `data` to an open file at byte `at`."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)
