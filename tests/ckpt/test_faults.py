"""Full and read-only disks, and bytes that flipped: one sentence, and the last good checkpoint is there."""

from __future__ import annotations

import random
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from veomni_ckpt import CheckpointError, CheckpointManager
from veomni_ckpt.names import named_tensors


class Net(nn.Module):
    """Two layers, and a state that is no tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.last = nn.Linear(width, 2, dtype=torch.bfloat16)
        self.seen = 0

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, state: int) -> None:
        self.seen = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.last(self.first(x).bfloat16()).float()


def make(seed: int, width: int = 8) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net(width)
    return model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    states = [state[key] for state in optimizer.state.values() for key in sorted(state)]
    tensors = [tensor.detach() for _, tensor in named_tensors(model)] + states
    return [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


FILES = [
    *("manifest.json", ".metadata", "__0_0.distcp", "extra_state.json", "extra_state.safetensors"),
    *("model.json", "model.safetensors", "optimizer.json", "optimizer.safetensors"),
]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes], list[bytes]]:
    """A folder with steps 1 and 2, and what each holds."""
    folder = tmp_path_factory.mktemp("steps")
    model, optimizer = make(0)
    manager, held = CheckpointManager(folder), []
    for step in (1, 2):
        train(model, optimizer)
        manager.save(step, model, optimizer, {"step": step, "order": torch.arange(9)})
        held.append(bits(model, optimizer))
    assert sorted(path.name for path in (folder / "global_step_2").iterdir()) == sorted(FILES)
    return folder, held[0], held[1]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_or_does_no_harm(two_steps: tuple[Path, list[bytes], list[bytes]], name: str) -> None:
    folder, first, second = two_steps
    path = folder / "global_step_2" / name
    whole = path.read_bytes()
    is_data = name.endswith(".distcp")
    chance = random.Random(name)
    places = sorted(chance.sample(range(len(whole)), min(len(whole), 60 if is_data else 8)))
    found = 0
    try:
        for place in places:
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << chance.randrange(8)
            path.write_bytes(spoilt)
            model, optimizer = make(1)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                extra = CheckpointManager(folder).load("auto", model, optimizer)
            if extra["step"] == 2:
                assert not said
                assert bits(model, optimizer) == second, f"byte {place} of {name} was not noticed"
                assert torch.equal(extra["order"], torch.arange(9))
                continue
            found += 1
            assert bits(model, optimizer) == first
            (warning,) = said
            assert "; the checkpoint before it is taken" in str(warning.message)
            assert "global_step_2/" in str(warning.message)
            if name != "manifest.json":
                assert f"global_step_2/{name} is damaged" in str(warning.message)
    finally:
        path.write_bytes(whole)
    # an archive of torch.save has padding and dates that nothing reads
    assert found > 20 if is_data else found == len(places)


def test_each_byte_of_a_tensor_is_checked(two_steps: tuple[Path, list[bytes], list[bytes]]) -> None:
    folder, _, second = two_steps
    path = folder / "global_step_2" / "__0_0.distcp"
    whole = path.read_bytes()
    try:
        for content in second:
            for place in {whole.index(content), whole.index(content) + len(content) - 1}:
                spoilt = bytearray(whole)
                spoilt[place] ^= 128
                path.write_bytes(spoilt)
                with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged( at \S+)?: its "):
                    CheckpointManager(folder).load(2, *make(1))
    finally:
        path.write_bytes(whole)


def test_a_file_that_grew_or_is_of_another_step_is_found(two_steps: tuple[Path, list[bytes], list[bytes]]) -> None:
    folder, _, _ = two_steps
    for name in FILES[1:]:
        path = folder / "global_step_2" / name
        whole = path.read_bytes()
        other = (folder / "global_step_1" / name).read_bytes()
        for content in {whole + b"\n", other} - {whole}:
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=f"global_step_2/{name} is (too long|damaged)"):
                CheckpointManager(folder).load(2, *make(1))
        path.write_bytes(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        answer = subprocess.run(mount, capture_output=True, text=True)
    except OSError:
        pytest.skip("this machine has no mount")
    if answer.returncode:
        pytest.skip(f"mounting is not allowed here: {answer.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


WIDTH = 60_000  # 5 parameters of float32 and 2 of bfloat16 each, and two moments: 4.3 MB


def fill_the_disk(folder: Path, sharded: bool, async_save: bool) -> str:
    """Save a step that there is room for and one that there is not; the error."""
    model, _ = make(0, WIDTH)
    if sharded:
        fully_shard(model.last)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    manager = CheckpointManager(folder, keep_last=1, async_save=async_save)
    manager.save(1, model, optimizer, {"step": 1})
    manager.wait()
    message = ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            manager.save(2, model, optimizer, {"step": 2})
            if async_save:
                manager.save(3, model, optimizer, {"step": 3})
        except CheckpointError as error:
            message = str(error)
    if async_save and manager._group is None:
        assert [str(warning.message) for warning in said] == [message], "it is said at once"
    assert manager.load("auto", model, optimizer) == {"step": 1}
    manager.close()
    return message


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(small_disk: Path, async_save: bool) -> None:
    message = fill_the_disk(small_disk, False, async_save)
    assert f"{small_disk}/global_step_2 was not saved: " in message
    assert re.search(r"No space left on device: .*distcp", message)
    assert "\n" not in message
    assert [path.name for path in small_disk.iterdir()] == ["global_step_1"]


def test_a_disk_that_is_full_for_one_rank_is_so_for_all(small_disk: Path, two_ranks: Ranks) -> None:
    messages = two_ranks.run(fill_the_disk, small_disk, True, False)
    assert messages[0] == messages[1]
    assert re.search(r"global_step_2 was not saved: rank [01]: .*No space left on device: .*distcp", messages[0])
    assert [path.name for path in small_disk.iterdir()] == ["global_step_1"]


def test_a_read_only_disk_is_one_sentence_and_can_be_read(small_disk: Path) -> None:
    model, optimizer = make(0)
    train(model, optimizer)
    manager = CheckpointManager(small_disk)
    manager.save(1, model, optimizer, {"step": 1})
    manager.protect(1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    actions: list[tuple[Any, str]] = [
        (lambda: manager.save(2, model, optimizer), "global_step_2 was not saved: "),
        (lambda: manager.protect(1), "global_step_1 cannot be protected: "),
        (lambda: manager.release(1), "global_step_1 cannot be released: "),
    ]
    for act, sentence in actions:
        with pytest.raises(CheckpointError, match=f"{sentence}.*Read-only file system"):
            act()
    assert manager.load("auto", *make(1)) == {"step": 1}
