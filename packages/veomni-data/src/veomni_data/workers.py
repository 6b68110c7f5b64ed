"""Worker processes that encode examples, whose death is noticed and told with the example they were at.

Not torch's DataLoader: what is to be encoded is decided as late as a worker is free, and torch tells of a dead worker
by an exception out of a signal handler, which may strike in the midst of a training step and knows of no sample.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import os
import pickle
import queue
import random
import signal
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from .encoding import Example, Request, from_wire, to_wire
from .errors import DataError

CHUNK = 8  # examples that are sent at once: one message each would cost more than packing
_PARENT_CHECK = 5.0  # seconds

Encode = Callable[[Request], Example]


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    begun: Any  # a shared integer: examples that it has begun to encode, over all
    ended: Any  # and those that it has ended
    jobs: deque[list[tuple[Any, Request]]]  # sent and not answered
    answered: int = 0  # examples

    def at(self) -> str:
        """The place of the example that it has begun and not ended."""
        number = self.ended.value - self.answered
        for chunk in self.jobs if self.begun.value > self.ended.value else ():
            if number < len(chunk):
                return str(chunk[number][0].place)
            number -= len(chunk)
        return ""


class Workers:
    """Processes that encode chunks of requests; answers come in any order.

    Args:
        encode: what they do; it is copied into each process when that starts.
        count: how many there are.
        init: called in each with its number before anything else.
        timeout: seconds that an answer may take; None = for ever.
        seed: each process seeds its random generators with it and its number.
    """

    def __init__(
        self, encode: Encode, count: int, *, init: Callable[[int], None] | None, timeout: float | None, seed: int
    ) -> None:
        self._timeout = timeout
        self._workers: list[_Worker] = []
        context: Any = mp.get_context()
        for number in range(count):
            ours, theirs = context.Pipe()
            begun, ended = context.RawValue(ctypes.c_int64), context.RawValue(ctypes.c_int64)
            process = context.Process(
                target=_work, args=(theirs, encode, begun, ended, init, number, seed), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, begun, ended, deque()))
        self._finalizer = weakref.finalize(self, _close, self._workers, os.getpid())

    @property
    def sent(self) -> int:
        """Examples sent and not answered."""
        return sum(len(chunk) for worker in self._workers for chunk in worker.jobs)

    def send(self, chunk: list[tuple[Any, Request]]) -> None:
        """Give a chunk, of at least one (ticket, request), to the worker with the least to do."""
        worker = min(self._workers, key=lambda worker: len(worker.jobs))
        with contextlib.suppress(OSError):  # if it is dead, `receive` will tell
            worker.pipe.send([request for _, request in chunk])
        worker.jobs.append(chunk)

    def receive(self) -> list[tuple[Any, Example]]:
        """Wait for an answer: the tickets of a chunk and what its requests gave.

        Raises:
            DataError: a worker has died or was too slow; its example is named by `place` of the ticket.
            Exception: what a worker's `encode` raised.
        """
        waiting = {worker.pipe: worker for worker in self._workers if worker.jobs}
        ready = wait(list(waiting), self._timeout)
        if not ready:
            places = [place for worker in waiting.values() if (place := worker.at())]
            self.close()
            raise DataError(
                f"no worker process has answered within {self._timeout:g} s; they were at: {', '.join(places)}"
            )
        worker = next(worker for pipe, worker in waiting.items() if pipe is ready[0])
        try:
            answers = pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._death(worker) from error
        if isinstance(answers, BaseException):
            self.close()
            raise answers
        tickets = [ticket for ticket, _ in worker.jobs.popleft()]
        worker.answered += len(tickets)
        examples = [e._replace(samples=[from_wire(sample) for sample in e.samples]) for e in answers]
        return list(zip(tickets, examples, strict=True))

    def close(self) -> None:
        """End the processes."""
        self._finalizer()

    def _death(self, worker: _Worker) -> DataError:
        worker.process.join(10)
        code, place = worker.process.exitcode, worker.at()
        how = f"was killed by {_signal_name(-code)}" if code is not None and code < 0 else f"ended with code {code}"
        self.close()
        return DataError(f"a worker process {how}" + (f" while it was at {place}" if place else ""))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _close(workers: Sequence[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # in a process that was forked from the one that they work for
        return
    for worker in workers:
        worker.pipe.close()  # which it takes as the end
        worker.process.terminate()
    for worker in workers:
        worker.process.join(5)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(
    pipe: Connection, encode: Encode, begun: Any, ended: Any, init: Callable[[int], None] | None, number: int, seed: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that it works for
    torch.set_num_threads(1)
    random.seed(seed + number)
    np.random.seed((seed + number) % 2**32)
    torch.manual_seed(seed + number)
    requests: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
    answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    # threads read and send, so that neither side ever waits for the other to read; the usual 5 ms for which they would
    # have to wait for Python's lock are more than a chunk takes
    sys.setswitchinterval(0.0005)
    threading.Thread(target=_read, args=(pipe, requests), daemon=True).start()
    sender = threading.Thread(target=_send, args=(pipe, answers), daemon=True)
    sender.start()
    try:
        if init is not None:
            init(number)
        while (chunk := requests.get()) is not None:
            examples = []
            for request in chunk:
                begun.value += 1
                example = encode(request)
                examples.append(example._replace(samples=[to_wire(sample) for sample in example.samples]))
                ended.value += 1
            answers.put(pickle.dumps(examples, protocol=5))
    except Exception as error:
        answers.put(_packed_error(error))
    answers.put(None)
    sender.join()


def _packed_error(error: Exception) -> bytes:
    text = "".join(traceback.format_exception(error))
    error.add_note(f"in a worker process:\n{text}")
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)  # some can be packed and not unpacked
    except Exception:
        return pickle.dumps(RuntimeError(text))
    return packed


def _read(pipe: Connection, requests: queue.SimpleQueue[list[Request] | None]) -> None:
    parent = os.getppid()
    try:
        while True:
            while not pipe.poll(_PARENT_CHECK):
                if os.getppid() != parent:
                    os._exit(1)
            requests.put(pipe.recv())
    except (EOFError, OSError):
        requests.put(None)


def _send(pipe: Connection, answers: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError):  # nobody is there any more
        while (answer := answers.get()) is not None:
            pipe.send_bytes(answer)
