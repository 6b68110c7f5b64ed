from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from veomni_recipes.run_folder import read_metrics

pytestmark = pytest.mark.alone

STEPS = 30


def start(arguments: list[str], folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """A run on two ranks in a session of its own, so that all its processes can be killed at once."""
    command = [sys.executable, "-m", "veomni_recipes.cli", "run", "train_omni_model", *arguments, *more]
    options = [f"--train.output_dir={folder}", f"--train.max_steps={STEPS}", "--train.save_steps=4"]
    env = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    log = folder.with_suffix(".log").open("ab")
    return subprocess.Popen([*command, *options], stdout=log, stderr=log, env=env, start_new_session=True)


def ranks_of(folder: Path) -> list[str]:
    """Command lines of the processes that still work on a run."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if f"--train.output_dir={folder}" in line]


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param([(8, 15)], id="once"),
        pytest.param([(1, 6), (8, 15), (16, 26)], id="three times", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_with_the_very_numbers_of_an_undisturbed_one(
    moments: list[tuple[int, int]], arguments: list[str], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(arguments, whole).wait() == 0
    random.seed()
    for earliest, latest in moments:
        run = start(arguments, cut, "--train.load_checkpoint_path=auto")
        kill_at, pause = random.randint(earliest, latest), random.uniform(0, 0.2)
        print(f"SIGKILL {pause:.3f} s after step {kill_at}")  # shown if the test fails
        while run.poll() is None and max([line["step"] for line in read_metrics(cut)], default=0) < kill_at:
            time.sleep(0.02)
        time.sleep(pause)  # anywhere in a step, or in a save
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        time.sleep(1)
        assert not ranks_of(cut), "a rank outlived its launcher"
    assert start(arguments, cut, "--train.load_checkpoint_path=auto").wait() == 0

    def numbers(folder: Path) -> list[tuple[float, ...]]:
        return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in read_metrics(folder)]

    assert len(numbers(whole)) == STEPS
    assert numbers(cut) == numbers(whole)


@pytest.mark.parametrize("told", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
@pytest.mark.timeout(200)
def test_a_run_that_is_told_to_stop_saves_itself_and_goes_on(
    told: signal.Signals, arguments: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "told"
    run = start(arguments, folder)
    while run.poll() is None and max([line["step"] for line in read_metrics(folder)], default=0) < 5:
        time.sleep(0.02)
    begin = time.monotonic()
    run.send_signal(told)
    assert run.wait(30) == 0
    assert time.monotonic() - begin < 30
    last = read_metrics(folder)[-1]["step"]
    assert 5 <= last < STEPS
    assert (folder / "checkpoints" / f"global_step_{last}").is_dir()
    assert not (folder / "summary.json").exists()
    assert f"told to stop: saved at step {last}" in folder.with_suffix(".log").read_text()
    assert start(arguments, folder, "--train.load_checkpoint_path=auto").wait(100) == 0
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, STEPS + 1))
