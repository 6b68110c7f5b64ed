"""What killed saves and conversions left is found, brought back or deleted; nothing else is touched."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest
from veomni_ckpt import CheckpointError, find_leftovers, prune, repair


def make(folder: Path, name: str, file: str = "model.safetensors", age: float = 3_600) -> Path:
    made = folder / name
    made.mkdir()
    (made / file).write_bytes(bytes(10))
    then = time.time() - age
    os.utime(made / file, (then, then))
    os.utime(made, (then, then))
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_what_is_ours_and_unfinished_is_deleted(tmp_path: Path) -> None:
    for name in (".hf.partial", ".global_step_3.partial", ".hf.removed", "hf"):
        make(tmp_path, name)
    make(tmp_path, ".others.partial", "download.tmp")
    make(tmp_path, ".git.removed", "HEAD")
    (tmp_path / ".file.partial").write_text("")
    expected = [".global_step_3.partial", ".hf.partial", ".hf.removed"]
    assert [leftover.path.name for leftover in find_leftovers(tmp_path)] == expected
    assert [leftover.nbytes for leftover in prune(tmp_path, dry_run=True)] == [10, 10, 10]
    assert set(expected) < set(names(tmp_path))
    assert [leftover.path.name for leftover in prune(tmp_path)] == expected
    assert names(tmp_path) == [".file.partial", ".git.removed", ".others.partial", "hf"]


def test_the_only_whole_copy_is_brought_back_not_deleted(tmp_path: Path) -> None:
    make(tmp_path, ".global_step_5.replaced", ".metadata")
    make(tmp_path, ".hf.replaced")
    make(tmp_path, "hf")
    assert [leftover.path.name for leftover in prune(tmp_path)] == [".hf.replaced"]
    assert [leftover.final.name for leftover in repair(tmp_path)] == ["global_step_5"]
    assert names(tmp_path) == ["global_step_5", "hf"]
    assert repair(tmp_path) == []


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    make(tmp_path, ".global_step_7.partial", ".metadata", age=5)
    converting = make(tmp_path, ".hf.partial", "conversion.json")
    lock = os.open(converting, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert [leftover.in_use for leftover in find_leftovers(tmp_path)] == [True, True]
    assert prune(tmp_path) == []
    os.close(lock)
    assert [leftover.path.name for leftover in prune(tmp_path)] == [".hf.partial"]


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent cannot be read"):
        find_leftovers(tmp_path / "absent")
