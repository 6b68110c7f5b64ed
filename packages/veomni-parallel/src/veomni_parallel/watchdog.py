"""A watch over the ranks of a run: which one hangs, and where, and which one is gone."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from veomni_parallel.errors import ParallelError

_COLLECTIVES = ("distributed_c10d.py", "_functional_collectives.py")  # files of torch
_LOST = ("connection", "peer", "timed out", "timeout", "nccl")  # in what a rank says that lost another one


class Watchdog:
    """Ends a run that hangs with one sentence that says which rank is where, instead of waiting for ever.

    Ranks that wait in a collective hang because another one does not come, and say nothing of it. Here a thread on each
    rank tells the others, through a store of its own, that the rank lives, and where its main thread is once no `beat`
    came for `timeout` seconds. The lowest rank alive reports, and all end. A rank whose thread falls silent is gone;
    what the others then raise (a lost connection) is raised as a `ParallelError` that names it. Every rank opens it
    together, after `init_process_group`, around all that follows, setup too:

        with Watchdog(timeout=600) as watchdog:
            model = build_parallelize_model(...)
            for step, batch in enumerate(loader):
                watchdog.beat(f"step {step}")

    With one process it does nothing.

    Args:
        timeout: seconds without a beat after which the run hangs; longer than the longest step, checkpoint or compile.
        silence: seconds without a sign of life after which a rank is gone.
        on_hang: what a rank does with the report; None prints it on the lowest rank and ends the process with code 1.
            It is called in the watching thread.
        before_end: called with the report on each rank before its process is ended so, such as to save what is known of
            the step.
    """

    def __init__(
        self,
        timeout: float = 600.0,
        silence: float = 20.0,
        on_hang: Callable[[str], None] | None = None,
        before_end: Callable[[str], None] | None = None,
    ) -> None:
        self._timeout, self._silence, self._on_hang, self._before_end = timeout, silence, on_hang, before_end
        self._period = min(1.0, silence / 10, timeout / 5)
        self._what, self._last = "setup", time.monotonic()
        self._state = "alive"  # or "done", or "failed: ..."
        self._ended = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}  # count and time of each rank's last sign of life
        self._told: dict[int, dict[str, Any]] = {}  # what each rank said in it
        self._store: Any = None
        self._cut_off = False  # whether the store is gone
        self._main = threading.get_ident()

    def beat(self, what: str) -> None:
        """The main thread goes on; `what` it does now is named if it comes no further."""
        self._what, self._last = what, time.monotonic()

    def __enter__(self) -> Watchdog:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
            self._store = self._open_store()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        try:
            if isinstance(error, Exception):
                self._explain(error)
        finally:
            self._ended.set()
            self._thread.join()
            self._say("done" if error is None else self._state)
            if self._rank == 0:  # the store ends with this process: what was said in it is to be heard
                self._wait_for_the_others(self._silence if error is None else 3 * self._period)

    def _wait_for_the_others(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._hear()
            if all(told["state"] != "alive" for rank, told in self._told.items() if rank != self._rank):
                time.sleep(2 * self._period)
                return
            time.sleep(self._period)

    def _open_store(self) -> Any:
        where: list[Any] = [None]
        store = None
        if self._rank == 0:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
            where = [(host, store.port)]
        dist.broadcast_object_list(where, src=0)
        if store is None:
            store = dist.TCPStore(*where[0], is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
        self._count = 0
        self._store = store
        self._say("alive")
        dist.barrier()  # from here on every rank has given a sign of life
        self._hear()
        return store

    def _say(self, state: str, place: str | None = None) -> None:
        """Give a sign of life, unless the store is gone."""
        self._count += 1
        sign = {"count": self._count, "state": state, "place": place, "what": self._what}
        self._ask(lambda: self._store.set(str(self._rank), json.dumps(sign)))

    def _ask(self, request: Callable[[], Any]) -> Any:
        """What the store answers; None once it is gone, as each further request would log that."""
        if not self._cut_off:
            try:
                return request()
            except (RuntimeError, ValueError):
                self._cut_off = True
        return None

    def _hear(self) -> None:
        """Take in what the others have said."""
        signs = self._ask(lambda: self._store.multi_get([str(rank) for rank in range(self._ranks)]))
        for rank, sign in enumerate(map(json.loads, signs or ())):
            if self._seen.get(rank, (0, 0.0))[0] != sign["count"]:
                self._seen[rank] = (sign["count"], time.monotonic())
            self._told[rank] = sign

    def _gone(self) -> list[int]:
        """Ranks that have fallen silent without an end."""
        now = time.monotonic()
        silent = [rank for rank, (_, at) in self._seen.items() if now - at > self._silence and rank != self._rank]
        gone = [rank for rank in silent if self._told[rank]["state"] == "alive"]
        return [0] if self._cut_off and 0 in gone else gone  # without the store of rank 0 nobody is heard

    def _failed(self) -> str | None:
        """What the first rank that failed by itself has said."""
        for rank, told in sorted(self._told.items()):
            if told["state"].startswith("failed: "):
                return f"Rank {rank} has failed in {told['what']}: {told['state'].removeprefix('failed: ')}"
        return None

    def _watch(self) -> None:
        reported_at: float | None = None
        while not self._ended.wait(self._period):
            late = time.monotonic() - self._last > self._timeout
            asked = late or any(told["place"] for told in self._told.values())
            self._say(self._state, self._place() if asked else None)
            self._hear()
            gone, failed = self._gone(), self._failed()
            if not gone and not failed and not any(told["place"] for told in self._told.values()):
                reported_at = None
                continue
            # the others are given time to say where they are, and a rank that has failed to say why
            reported_at = reported_at or time.monotonic()
            if self._state != "alive" or time.monotonic() - reported_at < 5 * self._period:
                continue
            self._report(failed or self._sentence(gone))

    def _report(self, sentence: str) -> None:
        gone = self._gone()
        ended = [rank for rank, told in self._told.items() if told["state"] != "alive" or rank in gone]
        living = [rank for rank in range(self._ranks) if rank not in ended]
        if self._on_hang is not None:
            self._on_hang(sentence)
            return
        if self._before_end is not None:
            try:
                self._before_end(sentence)
            except Exception:  # the run ends all the same
                traceback.print_exc()
        if self._rank == min(living):
            print(sentence, file=sys.stderr, flush=True)
            time.sleep(self._period)  # the sentence is out before a launcher ends this process for another's end
            os._exit(1)
        else:
            time.sleep(3 * self._period)
            os._exit(1)

    def _sentence(self, gone: list[int]) -> str:
        if gone:
            last = ", ".join(f"rank {rank} (last in {self._told[rank]['what']})" for rank in gone)
            return f"Gone without a word for {self._silence:g} s: {last}; the others wait for it in vain and end."
        places: dict[str, list[int]] = {}
        for rank, told in sorted(self._told.items()):
            if told["state"] == "alive":
                places.setdefault(told["place"] or "no place that it has told", []).append(rank)
        # ranks outside of a collective are those that the others wait for
        parts = sorted(places.items(), key=lambda each: ("called at" in each[0], each[1]))
        listed = "; ".join(f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))} {place}" for place, r in parts)
        return f"No rank has made progress for {self._timeout:g} s: {listed}."

    def _place(self) -> str:
        """Where the main thread is: in which collective, called from where."""
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame) if frame is not None else traceback.StackSummary()
        library = Path(dist.__file__).parents[1]
        own = [entry for entry in stack if library not in Path(entry.filename).parents]
        at = own[-1] if own else None
        where = f"{at.filename}:{at.lineno} ({at.line})" if at is not None else "a place that is not known"
        collectives = [
            e.name for e in stack if e.filename.endswith(("distributed_c10d.py", "_functional_collectives.py"))
        ]
        collectives = [name for name in collectives if name != "wrapper"]
        if collectives:
            return f"in {collectives[0]}, in {self._what}, called at {where}"
        return f"in {self._what}, at {where}"

    def _explain(self, error: Exception) -> None:
        """Raise what lost the others in place of what this rank has met, if it is another one's doing."""
        text = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        lost = isinstance(error, (RuntimeError, OSError)) and not isinstance(error, ParallelError)
        lost = lost and any(word in str(error).lower() for word in _LOST)
        self._state = f"{'lost' if lost else 'failed'}: {text}"
        if not lost:
            return
        deadline = time.monotonic() + self._silence + 5 * self._period
        while time.monotonic() < deadline:
            time.sleep(self._period)
            if failed := self._failed():
                raise ParallelError(failed) from error
            if gone := self._gone():
                raise ParallelError(self._sentence(gone)) from error
