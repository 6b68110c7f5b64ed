"""A run that is told to leave its machine: noticed at once, acted upon between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist


class StopSignals:
    """Notes SIGTERM and SIGUSR1, by which schedulers announce that they end a job, instead of ending at once.

        with StopSignals() as stop:
            for step, batch in enumerate(loader, 1):
                ...
                if stop.requested():
                    manager.save(step, model, optimizer, extra_state)
                    break

    Handlers are those of the process, so open it in the main thread, before worker processes are forked, which then
    outlive the signal too. What was installed before is put back at the end.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        """`signals`: others than SIGTERM and SIGUSR1."""
        self._signals = signals or (signal.SIGTERM, signal.SIGUSR1)
        self._before: dict[signal.Signals, Any] = {}
        self._received = False

    def __enter__(self) -> StopSignals:
        return self.listen()

    def listen(self) -> StopSignals:
        """What entering the block does, for a run that listens until its process ends."""
        self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def requested(self, device: torch.device | str = "cpu", group: Any = None) -> bool:
        """Whether any rank was told to stop: the same answer on all. A collective of one number; call it on every rank.

        Args:
            device: where the group's collectives take tensors.
            group: ranks that stop together; None: all.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self._received
        told = torch.tensor(float(self._received), device=device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
        return bool(told.item())
