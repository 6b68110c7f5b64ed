"""A checkpoint is a file from a stranger: nothing in it runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from veomni_ckpt import CheckpointError, CheckpointManager, manifest
from veomni_ckpt.dcp_files import read_metadata, verify_ranges


class Touch:
    """Unpickled by a trusting reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    CheckpointManager(tmp_path).save(1, nn.Linear(2, 2))
    return tmp_path / "global_step_1"


def forge(checkpoint: Path) -> None:
    """Checksums do not help against who can write them too."""
    (checkpoint / manifest.NAME).unlink()
    (checkpoint / manifest.NAME).write_bytes(manifest.of_files(checkpoint, trainable_only=False).encode())


def metadata_of(checkpoint: Path) -> Metadata:
    return read_metadata(checkpoint / ".metadata", (checkpoint / ".metadata").read_bytes())


def test_a_trusting_reader_would_run_it(checkpoint: Path, tmp_path: Path) -> None:
    """What the other tests guard against is real: torch's own reader runs the same file."""
    proof = tmp_path / "ran"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Touch(proof)))
    with pytest.raises(AttributeError):
        dcp.FileSystemReader(checkpoint).read_metadata()
    assert proof.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_the_metadata_does_not_run(checkpoint: Path, tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "ran"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Touch(proof), protocol=protocol))
    forge(checkpoint)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read \(it asks for (posix|os)\.system"):
        CheckpointManager(tmp_path).load(1, nn.Linear(2, 2))
    assert not proof.exists()


class Extra(nn.Linear):
    """A module whose extra state is no tensor, which DCP would pickle."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_of_modules_is_plain_values(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    model, manager = Extra(2, 2), CheckpointManager(tmp_path)
    model.extra = {"scale": [1.5, "e4m3"]}
    manager.save(1, model)
    loaded = Extra(2, 2)
    manager.load(1, loaded)
    assert loaded.extra == model.extra

    model.extra = Touch(proof)
    with pytest.raises(CheckpointError, match=r"model\['_extra_state'\] is a Touch"):
        manager.save(2, model)


def test_code_in_an_item_of_the_data_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    item = {"model": {"weight": Touch(proof), "bias": torch.zeros(2)}}
    dcp.save(item, storage_writer=dcp.FileSystemWriter(checkpoint), no_dist=True)
    forge(checkpoint)
    with pytest.raises(CheckpointError, match="weight is no tensor in the checkpoint"):
        CheckpointManager(tmp_path).load(1, nn.Linear(2, 2))
    assert not proof.exists()


def test_paths_in_the_metadata_may_not_leave_the_folder(checkpoint: Path) -> None:
    for name in ("../global_step_0/__0_0.distcp", "/etc/passwd"):
        metadata = metadata_of(checkpoint)
        next(iter(metadata.storage_data.values())).relative_path = name
        with pytest.raises(CheckpointError, match="is not in the folder"):
            verify_ranges(checkpoint, metadata, manifest.sizes(checkpoint))


def test_a_tensor_that_is_only_half_described_is_found(checkpoint: Path) -> None:
    metadata = metadata_of(checkpoint)
    metadata.state_dict_metadata["model.weight"].size = torch.Size([4, 2])
    with pytest.raises(CheckpointError, match=r"does not say where all of model\.weight is stored"):
        verify_ranges(checkpoint, metadata, manifest.sizes(checkpoint))


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"not a pickle", pickle.dumps({"a": torch.float32})])
def test_metadata_that_is_none_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata (cannot be read|holds a)"):
        metadata_of(checkpoint)
