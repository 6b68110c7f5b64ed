"""Checkpoints on file systems of fsspec: complete from their manifest on, whatever a kill leaves."""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from upath import UPath
from veomni_ckpt import CheckpointError, CheckpointManager
from veomni_ckpt.names import named_tensors


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [state[key] for state in optimizer.state.values() for key in sorted(state)]
    tensors = [tensor for _, tensor in named_tensors(model)] + states
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for t in tensors]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def keep_two(folder: str) -> dict[int, list[torch.Tensor]]:
    """Four steps, of which `keep_last` leaves two; what each of them holds."""
    model, optimizer = make()
    manager = CheckpointManager(folder, keep_last=2)
    assert manager.latest() is None
    assert manager.load("auto", model, optimizer) is None
    held = {}
    for step in (1, 2, 3, 10):
        train(model, optimizer)
        manager.save(step, model, optimizer, {"step": step, "rng": torch.arange(3)})
        held[step] = contents(model, optimizer)
    return held


def check_all(url: str) -> None:
    """All that the manager promises, on a store without renames."""
    held = keep_two(url)
    manager = CheckpointManager(url, keep_last=2)
    assert manager.latest() == 10
    assert sorted(path.name for path in UPath(url).iterdir()) == ["global_step_10", "global_step_3"]
    model, optimizer = make(1)
    extra = manager.load("auto", model, optimizer)
    assert extra["step"] == 10
    assert torch.equal(extra["rng"], torch.arange(3))
    assert same(contents(model, optimizer), held[10])
    assert manager.load(f"{url}/global_step_3", model, optimizer)["step"] == 3
    assert same(contents(model, optimizer), held[3])
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*global_step_7"):
        manager.load(7, model, optimizer)

    # a save that was killed has no manifest; one that was killed while it replaced a step leaves the old one whole
    for leftover in ("global_step_11/__0_0.distcp", "global_step_10/again_00000000/__0_0.distcp"):
        path = UPath(url) / leftover
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half of it")
    assert manager.latest() == 10
    assert manager.load("auto", model, optimizer)["step"] == 10
    assert same(contents(model, optimizer), held[10])

    # the same step again, twice: the first becomes the second only with the manifest
    for again in ("once", "twice"):
        train(model, optimizer)
        manager.save(10, model, optimizer, {"again": again})
        assert manager.load("auto", *make()) == {"again": again}
    expected = contents(model, optimizer)
    other, other_optimizer = make(2)
    manager.load(10, other, other_optimizer)
    assert same(contents(other, other_optimizer), expected)
    assert not (UPath(url) / "global_step_11" / "__0_0.distcp").exists()
    assert [path.name[:6] for path in (UPath(url) / "global_step_10").iterdir() if path.is_dir()] == ["again_"]

    # steps that stay
    manager.protect(3)
    manager.save(12, model, optimizer)
    manager.save(13, model, optimizer)
    assert {path.name for path in UPath(url).iterdir()} == {"global_step_12", "global_step_13", "global_step_3"}
    manager.release(3)
    manager.save(14, model, optimizer)
    assert {path.name for path in UPath(url).iterdir()} == {"global_step_13", "global_step_14"}

    # damage
    data = next(path for path in (UPath(url) / "global_step_14").iterdir() if path.name.endswith(".distcp"))
    spoilt = bytearray(data.read_bytes())
    spoilt[710] ^= 1  # in the first tensor
    data.write_bytes(bytes(spoilt))
    with pytest.warns(UserWarning, match=r"__0_0\.distcp is damaged at .*; the checkpoint before it is taken"):
        manager.load("auto", model, optimizer)
    data.unlink()
    with pytest.warns(UserWarning, match=r"__0_0\.distcp is missing; the checkpoint before it is taken"):
        manager.load("auto", model, optimizer)
    (UPath(url) / "global_step_14" / "manifest.json").write_bytes(b"{")
    with pytest.warns(UserWarning, match=r"global_step_14/manifest\.json cannot be read"):
        manager.load("auto", model, optimizer)
    for step in (14, 15):
        manager.save(step, model, optimizer, {"step": step})
        assert manager.load("auto", model, optimizer) == {"step": step}


def test_memory_keeps_all_promises() -> None:
    check_all(f"memory://{uuid.uuid4()}/run/checkpoints")


def test_an_asynchronous_save_goes_there_too() -> None:
    url = f"memory://{uuid.uuid4()}"
    model, optimizer = make()
    train(model, optimizer)
    manager = CheckpointManager(url, async_save=True)
    manager.save(1, model, optimizer)
    expected = contents(model, optimizer)
    train(model, optimizer)
    manager.close()
    other = make(1)
    CheckpointManager(url).load("auto", *other)
    assert same(contents(*other), expected)


def test_a_checkpoint_that_was_copied_to_the_disk_loads(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4()}"
    manager = CheckpointManager(url)
    model, optimizer = make()
    for step in (1, 1):  # the second lies below the step's folder
        train(model, optimizer)
        manager.save(step, model, optimizer)
    fsspec.filesystem("memory").get(url, str(tmp_path / "copy"), recursive=True)
    other = make(1)
    CheckpointManager(tmp_path / "copy").load("auto", *other)
    assert same(contents(*other), contents(model, optimizer))


class FullError(OSError):
    """What a store says that takes no more."""


def test_a_store_that_fails_amid_a_save_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{uuid.uuid4()}"
    held = keep_two(url)
    system = type(fsspec.filesystem("memory"))
    real = system._open
    left = 0  # how many files it takes before it is full

    def open_until_full(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        nonlocal left
        if "w" in mode:
            left -= 1
            if left < 0:
                raise FullError("quota exceeded")
        return real(self, path, mode, **options)

    model, optimizer = make(3)
    train(model, optimizer)
    manager = CheckpointManager(url)
    files = len(list((UPath(url) / "global_step_10").iterdir()))
    assert files == 7
    for taken in range(files):
        left = taken
        monkeypatch.setattr(system, "_open", open_until_full)
        with pytest.raises(
            CheckpointError, match=r"global_step_10 was not saved: (rank 0: )?FullError: quota exceeded"
        ):
            manager.save(10, model, optimizer, {"step": "again"})
        monkeypatch.undo()
        assert manager.latest() == 10
        other = make(1)
        assert manager.load("auto", *other)["step"] == 10
        assert same(contents(*other), held[10])
    manager.save(10, model, optimizer, {"step": "again"})
    assert manager.load("auto", model, optimizer) == {"step": "again"}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(CheckpointError, match=r"memory://run needs the package upath: pip install 'veomni-ckpt\["):
        CheckpointManager("memory://run")


def test_file_urls_are_folders_of_this_machine(tmp_path: Path) -> None:
    CheckpointManager(f"file://{tmp_path}").save(1, *make())
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_1"]


@pytest.fixture
def bucket() -> Iterator[tuple[str, str]]:
    """A server that speaks S3: its address, and a bucket's URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    use(endpoint)
    name = f"b{uuid.uuid4()}"
    fsspec.filesystem("s3").mkdir(name)
    yield endpoint, f"s3://{name}"
    server.stop()
    fsspec.config.conf.pop("s3")


def use(endpoint: str) -> None:
    """What a user puts into fsspec's configuration."""
    fsspec.config.conf["s3"] = {"endpoint_url": endpoint, "key": "any", "secret": "any"}


def shard(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, _ = make(seed)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def save_and_load(endpoint: str, url: str) -> list[torch.Tensor]:
    use(endpoint)
    model, optimizer = shard(0)
    manager = CheckpointManager(url, keep_last=1, async_save=True)
    for step in (1, 2, 3):
        train(model, optimizer)
        manager.save(step, model, optimizer, {"step": step})
    manager.wait()
    other, other_optimizer = shard(1)
    assert manager.load("auto", other, other_optimizer) == {"step": 3}
    manager.close()
    held = contents(model, optimizer)
    assert same(contents(other, other_optimizer), held)
    return held


@pytest.mark.slow
def test_s3_keeps_all_promises(bucket: tuple[str, str], two_ranks: Ranks, tmp_path: Path) -> None:
    endpoint, url = bucket
    check_all(f"{url}/run/checkpoints")
    held = two_ranks.run(save_and_load, endpoint, f"{url}/ranks")[0]
    assert [path.name for path in UPath(f"{url}/ranks").iterdir()] == ["global_step_3"]
    other = make(1)
    CheckpointManager(f"{url}/ranks").load("auto", *other)
    assert same(contents(*other), held)
    # as `aws s3 cp --recursive` leaves it
    fsspec.filesystem("s3").get(f"{url}/ranks/global_step_3/", str(tmp_path / "copy"), recursive=True)
    copied = make(2)
    CheckpointManager(tmp_path).load(tmp_path / "copy", *copied)
    assert same(contents(*copied), held)
    shutil.rmtree(tmp_path / "copy")
