"""Tensors with odd strides are made straight, whatever the strides, in blocks of any size."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from veomni_ckpt import CheckpointError, dcp_to_hf, scratch
from veomni_ckpt.saved_item import ItemError, locate


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """A permuted tensor; at times a part of a larger one, or with repeated rows."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).view(shape)
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if draw(st.booleans()):
        tensor = tensor[:, ::2] if tensor.dim() > 1 else tensor[::2]
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


@given(strided(), st.sampled_from([2, 16, 2**23]))
def test_any_strides_come_out_in_row_major_order(tensor: torch.Tensor, block: int) -> None:
    saved = io.BytesIO()
    torch.save(tensor, saved)
    old, scratch._BLOCK = scratch._BLOCK, block
    try:
        with tempfile.TemporaryFile() as item, tempfile.TemporaryFile() as out:
            item.write(b"odd" + saved.getvalue())
            item.flush()
            stored = locate(item.fileno(), 3, len(saved.getvalue()), {})
            assert stored.shape == tuple(tensor.shape)
            assert stored.strides == tensor.stride()
            assert scratch.is_row_major(stored.shape, stored.strides) == tensor.is_contiguous()
            if tensor.is_contiguous():
                return
            scratch.straighten(item.fileno(), stored, out)
            out.seek(0)
            assert out.read() == tensor.contiguous().numpy().tobytes()
    finally:
        scratch._BLOCK = old


def test_they_are_read_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, ...]] = []
    straighten = scratch.straighten

    def noted(descriptor: int, stored: Any, out: Any) -> None:
        used.append(stored.strides)
        straighten(descriptor, stored, out)

    monkeypatch.setattr("veomni_ckpt.dcp_checkpoint.straighten", noted)
    state = {"a": torch.randn(5, 7).t(), "b": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    state["c"] = torch.randn(4, 6)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    dcp_to_hf(tmp_path / "dcp", tmp_path / "hf")
    assert sorted(used) == [(1, 7), (60, 1, 15, 3)]
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in state.items())


def compressed(tmp_path: Path) -> Path:
    pytest.importorskip("zstandard")
    from torch.distributed.checkpoint._extension import ZStandard

    writer = dcp.FileSystemWriter(tmp_path / "dcp", _extensions=[ZStandard()])
    dcp.save({"w": torch.arange(10_000)}, storage_writer=writer, no_dist=True)
    return tmp_path / "dcp"


def test_without_a_decoder_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compressed(tmp_path)
    monkeypatch.setattr("importlib.import_module", _no_module)
    with pytest.raises(CheckpointError, match=r"distcp cannot be read: it is compressed .*: install `zstandard`"):
        dcp_to_hf(folder, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


def _no_module(name: str) -> None:
    raise ImportError(name)


def test_damaged_compressed_data_is_named(tmp_path: Path) -> None:
    folder = compressed(tmp_path)
    file = next(folder.glob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"distcp has no readable w at byte 0: its compressed data is damaged"):
        dcp_to_hf(folder, tmp_path / "hf")


def test_a_few_compressed_bytes_cannot_become_gigabytes(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(bytes(50_000_000))
    file = tmp_path / "bomb"
    file.write_bytes(packed)
    descriptor = os.open(file, os.O_RDONLY)
    with tempfile.TemporaryFile() as out:
        with pytest.raises(ItemError, match="more than the 1000 bytes"):
            scratch.decompress(descriptor, 0, len(packed), ("stream.zstd/1",), 1000, out)
        assert os.fstat(out.fileno()).st_size <= 2**18
    os.close(descriptor)
