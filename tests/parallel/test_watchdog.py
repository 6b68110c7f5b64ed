"""Runs that hang or lose a rank end soon, and say why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from veomni_parallel import Watchdog

pytestmark = pytest.mark.alone

PROGRAM = """
import datetime, os, signal, sys, time
import torch
import torch.distributed as dist
from veomni_parallel import ParallelError, Watchdog

what = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()

def train():
    with Watchdog(timeout=3, silence=4) as watchdog:
        if what == "setup" and rank == 1:
            raise ValueError("no such folder")
        for step in range(10**6):
            watchdog.beat(f"step {step}")
            dist.all_reduce(torch.ones(2))
            if step == 5:
                if what == "end":
                    return
                if what == "slow":
                    time.sleep(1.5)
                if what == "hang" and rank == 1:
                    time.sleep(1000)  # a reader that waits
                if what.startswith("kill") and rank == int(what[-1]):
                    os.kill(os.getpid(), signal.SIGKILL)
            if step == 8 and what == "slow":
                return

try:
    train()
except ParallelError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
print("ended")
"""


def run(tmp_path: Path, what: str, ranks: int = 3) -> tuple[list[int], list[str], float]:
    """Exit codes and stderr of ranks that were started by hand, and how long they took."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    start = time.monotonic()
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = os.environ | {key: str(value) for key, value in own.items()}
        command = [sys.executable, str(program), what]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    try:
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said, time.monotonic() - start


@pytest.mark.parametrize("what", [pytest.param("end", marks=pytest.mark.slow), "slow"])
def test_a_run_that_goes_on_is_left_alone(tmp_path: Path, what: str) -> None:
    codes, said, _ = run(tmp_path, what)
    assert codes == [0, 0, 0], said


def test_a_run_that_hangs_says_who_is_where(tmp_path: Path) -> None:
    codes, said, seconds = run(tmp_path, "hang")
    assert codes == [1, 1, 1]
    assert seconds < 45
    (sentence,) = [line for line in said[0].splitlines() if line.startswith("No rank has made progress")]
    first, second = sentence.split("; ")
    assert "rank 1 in step 5, at" in first
    assert "time.sleep(1000)" in first
    assert "ranks 0, 2 in all_reduce, in step 6, called at" in second


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_rank_that_is_killed_is_named_by_the_others(tmp_path: Path, killed: int) -> None:
    codes, said, seconds = run(tmp_path, f"kill {killed}")
    assert codes[killed] == -signal.SIGKILL
    assert seconds < 45
    others = [rank for rank in range(3) if rank != killed]
    assert all(codes[rank] in (1, 2) for rank in others), (codes, said)
    assert any(f"rank {killed} (last in " in said[rank] for rank in others), said


def test_a_rank_that_fails_in_setup_is_named_by_the_others(tmp_path: Path) -> None:
    codes, said, seconds = run(tmp_path, "setup")
    assert 0 not in codes
    assert seconds < 45
    assert "ValueError: no such folder" in said[1]
    assert any("Rank 1 has failed in setup: ValueError: no such folder" in said[rank] for rank in (0, 2)), said


def test_one_process_needs_no_watch() -> None:
    with Watchdog(timeout=1) as watchdog:
        watchdog.beat("step 1")
    with pytest.raises(ValueError, match="as it was"), Watchdog():
        raise ValueError("as it was")
