"""SIGKILL while saving: what is left loads, whatever moment it was."""

from __future__ import annotations

import importlib
import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from veomni_ckpt import CheckpointManager

pytestmark = pytest.mark.alone


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(30)])
    return model, torch.optim.AdamW(model.parameters())


def save_for_ever(folder: Path, started: object, async_save: bool) -> None:
    """Every tensor of step N is filled with N, so that halves of two steps could not pass for one."""
    torch.set_num_threads(1)
    model, optimizer = build()
    manager = CheckpointManager(folder, keep_last=2, async_save=async_save)
    step = first = manager.latest() or 0
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    while True:
        step += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
            for state in optimizer.state.values():
                for value in state.values():
                    value.fill_(step)
        manager.save(step, model, optimizer, {"step": step, "tensor": torch.full((3,), step)})
        if step == first + 2:  # the save before this one is whole, also if this one is only in flight
            started.set()  # type: ignore[attr-defined]


@pytest.mark.parametrize("async_save", [False, True])
def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_whole(tmp_path: Path, async_save: bool) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "veomni_ckpt", "torch._dynamo"]
    )  # the first optimizer step imports the last
    moments = random.Random(0)
    steps = [0]
    leftovers = 0
    for _ in range(6):
        started = context.Event()
        process = context.Process(target=save_for_ever, args=(tmp_path, started, async_save), daemon=True)
        process.start()
        assert started.wait(60)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        leftovers += any(path.name.startswith(".") for path in tmp_path.iterdir())

        model, optimizer = build()
        extra = CheckpointManager(tmp_path).load("auto", model, optimizer)
        assert extra is not None
        step = extra["step"]
        assert step > steps[-1]
        steps.append(step)
        states = [value for state in optimizer.state.values() for value in state.values()]
        for tensor in [extra["tensor"], *model.parameters(), *states]:
            assert (tensor == step).all()
        assert len(states) == 3 * len(list(model.parameters()))
    assert leftovers, "no kill met a save: the test has shown nothing"


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_with_the_losses_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    kill_runs = importlib.import_module("ckpt_kills").kill_runs
    kills = kill_runs(tmp_path, during_saves=2, during_steps=1, world_size=1, steps=30)
    assert kills.during_saves >= 2
    assert kills.during_steps >= 1
    assert kills.losses_compared >= 30
    assert kills.runs_finished >= 1
