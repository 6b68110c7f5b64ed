"""What goes wrong in the background is told in the foreground, and nothing waits for ever."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from veomni_ckpt.block_writer import BlockWriter, Slot


def test_blocks_arrive_in_their_places(tmp_path: Path) -> None:
    data = os.urandom(100_001)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with BlockWriter(4_096) as writer:
        writer.write_bytes(memoryview(data)[50_000:], descriptor, 50_000)
        writer.write_bytes(memoryview(data)[:50_000], descriptor, 0)
        writer.finish()
        assert (tmp_path / "file").read_bytes() == data
    os.close(descriptor)


def test_a_failed_write_is_raised_and_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    with BlockWriter(4_096) as writer:
        with pytest.raises(OSError, match="Bad file descriptor"):
            writer.write_bytes(memoryview(bytes(100_000)), descriptor, 0)
        with pytest.raises(OSError, match="Bad file descriptor"):
            writer.finish()
        writer.drain()
    os.close(descriptor)
    assert "veomni-ckpt" not in [thread.name for thread in threading.enumerate()]


def test_a_failed_read_leaves_the_buffers_usable(tmp_path: Path) -> None:
    def broken(slot: Slot) -> int:
        raise RuntimeError("no data")

    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with BlockWriter(4_096) as writer:
        for _ in range(5):  # more than there are buffers
            with pytest.raises(RuntimeError, match="no data"):
                writer.write_block(broken, descriptor, 0)
        writer.write_bytes(memoryview(b"data"), descriptor, 0)
        writer.finish()
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"data"
