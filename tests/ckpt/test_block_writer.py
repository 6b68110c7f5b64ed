"""What goes wrong in the background is told in the foreground, and nothing waits for ever."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from veomni_ckpt.block_writer import BlockWriter, Slot, write_at

BLOCK = 4_096


def copy(data: memoryview, descriptor: int, at: int, slot: Slot) -> None:
    """A job: a block by way of the buffer."""
    part = data[at : at + BLOCK]
    slot.memory[: len(part)] = part
    time.sleep(0.001)  # another thread may come in between
    write_at(descriptor, slot.memory[: len(part)], at)


def test_blocks_arrive_in_their_places(tmp_path: Path) -> None:
    data = os.urandom(100_001)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with BlockWriter(BLOCK) as writer:
        for at in range(0, len(data), BLOCK):
            writer.put(partial(copy, memoryview(data), descriptor, at))
        writer.finish()
        assert (tmp_path / "file").read_bytes() == data
    os.close(descriptor)


def test_a_failed_job_is_raised_and_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    done: list[int] = []
    with BlockWriter(BLOCK) as writer:
        more_than_wait = [partial(copy, memoryview(bytes(BLOCK)), descriptor, 0)] * 1_000
        with pytest.raises(OSError, match="Bad file descriptor"):
            any(map(writer.put, more_than_wait))
        with pytest.raises(OSError, match="Bad file descriptor"):
            writer.put(lambda slot: done.append(1))
        with pytest.raises(OSError, match="Bad file descriptor"):
            writer.finish()
        writer.drain()
    os.close(descriptor)
    assert not done
    assert "veomni-ckpt" not in [thread.name for thread in threading.enumerate()]
