"""Signals by which a scheduler announces the end, noticed by all ranks between two steps."""

from __future__ import annotations

import os
import signal

import pytest
from ranks import Ranks
from veomni_ckpt import StopSignals


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_handlers_are_put_back(told: signal.Signals) -> None:
    before = signal.getsignal(told)
    with StopSignals() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), told)
        assert stop.requested()
        assert stop.requested(), "it stays"
    assert signal.getsignal(told) is before


def test_other_signals_can_be_chosen() -> None:
    with StopSignals(signal.SIGUSR2) as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.requested()


def one_is_told() -> list[bool]:
    answers = []
    with StopSignals() as stop:
        for step in range(4):
            if step == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR1)
            answers.append(stop.requested())
    return answers


def test_all_ranks_stop_at_the_same_step(two_ranks: Ranks) -> None:
    assert two_ranks.run(one_is_told) == [[False, False, True, True]] * 2
