"""Saving in the background: one at a time, never torn, and not cut short by the end of the program."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from veomni_ckpt import CheckpointError, CheckpointManager, saving


def test_one_save_is_in_flight_and_training_goes_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, writing, real = threading.Event(), [], saving.write

    def slow(snapshot: saving.Snapshot, *rest: Any) -> None:
        writing.append(snapshot.step)
        assert may_write.wait(60)
        real(snapshot, *rest)

    monkeypatch.setattr(saving, "write", slow)
    model = nn.Linear(3, 2)
    manager = CheckpointManager(tmp_path, async_save=True)
    weights = []
    for step in (1, 2):
        if step == 2:
            assert not list(tmp_path.iterdir()), "the first has not been written yet"
            threading.Timer(0.3, may_write.set).start()
        manager.save(step, model)
        assert writing[:1] == [1]
        if step == 2:  # it came back when the first was whole
            assert (tmp_path / "global_step_1").exists()
        weights.append(model.weight.detach().clone())
        with torch.no_grad():
            model.weight.add_(1)
    manager.close()
    assert writing == [1, 2]
    for step, weight in enumerate(weights, 1):
        other = nn.Linear(3, 2)
        CheckpointManager(tmp_path).load(step, other)
        assert torch.equal(other.weight, weight)


def failure_of_save(manager: CheckpointManager, model: nn.Module) -> BaseException | None:
    manager.save(2, model)
    assert manager._in_flight is not None
    return manager._in_flight.exception(60)


def test_what_went_wrong_is_said_at_once_and_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, manager = nn.Linear(3, 2), CheckpointManager(tmp_path, async_save=True)
    manager.save(1, model)
    manager.wait()
    monkeypatch.setattr(saving, "_complete", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    sentence = "global_step_2 was not saved: .*Input/output error"
    with pytest.warns(UserWarning, match=sentence):
        assert failure_of_save(manager, model) is not None
    with pytest.raises(CheckpointError, match=sentence):
        manager.save(3, model)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_1"]
    manager.save(4, model)
    manager.close()
    assert manager.latest() == 4


ENDS_AT_ONCE = """
import sys, torch
from veomni_ckpt import CheckpointManager
model = torch.nn.Linear(1000, 3000)  # 12 MB: still being written when the program has no more to do
CheckpointManager(sys.argv[1], async_save=True).save(1, model, extra_state={"sum": model.weight.sum().item()})
"""


def test_the_program_ends_only_when_the_checkpoint_is_whole(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ENDS_AT_ONCE, str(tmp_path)], check=True, timeout=100)
    model = nn.Linear(1000, 3000)
    extra = CheckpointManager(tmp_path).load("auto", model)
    assert extra["sum"] == model.weight.sum().item()
