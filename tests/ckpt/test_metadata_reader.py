"""The compact reader of `.metadata` says what torch's own says, quickly and in little memory."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from veomni_ckpt import metadata_reader
from veomni_ckpt.metadata_reader import DcpMetadata, read_dcp_metadata


def as_plain(found: DcpMetadata) -> dict[str, Any]:
    return {
        "tensors": {name: (e.dtype.name, e.shape, e.chunks) for name, e in found.tensors.items()},
        "objects": found.objects,
        "paths": found.paths,
        "places": {
            (name, offsets): (found.files[file], offset, length)
            for name, places in found.places.items()
            for offsets, file, offset, length in places
        },
    }


def as_torch_says(folder: Path) -> dict[str, Any]:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    tensors, objects = {}, []
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            tensors[name] = (str(entry.properties.dtype)[6:], tuple(entry.size), chunks)
        else:
            objects.append(name)
    places = {
        (index.fqn, None if index.offset is None else tuple(index.offset)): (p.relative_path, p.offset, p.length)
        for index, p in metadata.storage_data.items()
    }
    return {"tensors": tensors, "objects": objects, "paths": metadata.planner_data, "places": places}


def synthetic(tensors: int, shards: int, *, distinct: bool = False) -> Metadata:
    """As torch writes it for `tensors` matrices in `shards` row blocks; every rank's names are objects of their own."""
    entries, places, paths = {}, {}, {}
    for number in range(tensors):
        name = f"model.layers.{number // 100}.experts.{number % 100}.gate_proj.weight"
        rows = 300 + (number if distinct else 0)
        chunks = [
            ChunkStorageMetadata(torch.Size([rows * shard, 0]), torch.Size([rows, 70_000])) for shard in range(shards)
        ]
        size = torch.Size([rows * shards, 70_000])
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, chunks)
        paths[name] = ("model", name[6:])
    for shard in range(shards):
        own_names = pickle.loads(pickle.dumps(list(entries)))
        for number, name in enumerate(own_names):
            offset = entries[name].chunks[shard].offsets
            info = _StorageInfo(f"__{shard}_0.distcp", 42_000_700 * number, 42_000_700)
            places[MetadataIndex(name, offset, shard)] = info
    return Metadata(entries, paths, places, StorageMeta(), "1.0.0")  # type: ignore[arg-type]


def without_records(monkeypatch: pytest.MonkeyPatch) -> None:
    never = re.compile(b"(?!)")
    monkeypatch.setattr(metadata_reader, "ANY_CHUNK", never)
    monkeypatch.setattr(metadata_reader, "ANY_PLACE", never)


@pytest.mark.parametrize("writer", ["plain", "files", "threads", "zstd"])
@pytest.mark.parametrize("by_opcode", [False, True])
def test_it_says_what_torch_says(saved: Path, monkeypatch: pytest.MonkeyPatch, writer: str, by_opcode: bool) -> None:
    if by_opcode:
        without_records(monkeypatch)
    assert as_plain(read_dcp_metadata(saved / writer / ".metadata")) == as_torch_says(saved / writer)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("window", [2**22, 150_000])
def test_records_and_opcodes_are_read_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, window: int
) -> None:
    """Whatever the protocol, and wherever the file is cut into windows."""
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(synthetic(60, 30, distinct=True), protocol))
    monkeypatch.setattr("veomni_ckpt.pickle_reader.WINDOW", window)
    quick = as_plain(read_dcp_metadata(path))
    expected = as_torch_says(tmp_path)
    assert quick == expected
    without_records(monkeypatch)
    assert as_plain(read_dcp_metadata(path)) == expected


def test_records_are_in_fact_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first of each kind, and those that a frame of the pickle cuts in two."""
    made: list[Any] = []

    class Counted(metadata_reader.Instance):
        def __init__(self, kind: Any) -> None:
            made.append(kind.name)
            super().__init__(kind)

    monkeypatch.setattr("veomni_ckpt.pickle_reader.Instance", Counted)
    monkeypatch.setattr("veomni_ckpt.metadata_reader.Instance", Counted)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(synthetic(50, 8)))
    assert len(read_dcp_metadata(tmp_path / ".metadata").tensors) == 50
    for kind in ("ChunkStorageMetadata", "MetadataIndex", "_StorageInfo"):
        assert 1 <= made.count(kind) <= 4, kind


def test_names_that_look_like_opcodes_are_read(tmp_path: Path) -> None:
    names = ["a\x94b", "offsets", "sizes", "ü" * 60, "x" * 300, "ub", "\x8c", "model.\U0001f600", "fqn"]
    names += [f"Ɣ{number}" for number in range(300)]  # their last byte in UTF-8 is the opcode MEMOIZE
    state = {name: torch.zeros(number % 5, 2) for number, name in enumerate(names)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    assert as_plain(read_dcp_metadata(tmp_path / ".metadata")) == as_torch_says(tmp_path)


def test_shapes_of_any_number_and_size_are_read(tmp_path: Path) -> None:
    shapes = [(), (0,), (1,) * 5, (1,) * 17, (1,) * 30, (300, 2), (70_000,), (1, 256, 1)]
    state = {str(shape): torch.zeros(shape, dtype=torch.int8) for shape in shapes}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    assert as_plain(read_dcp_metadata(tmp_path / ".metadata")) == as_torch_says(tmp_path)
    big = torch.Size([2**33, 5])
    chunks = [ChunkStorageMetadata(torch.Size([2**40 * n, 0]), big) for n in range(9)]
    entry = TensorStorageMetadata(TensorProperties(), big, chunks)
    places = {MetadataIndex("w", c.offsets): _StorageInfo("f", 2**50 + n, 2**35) for n, c in enumerate(chunks)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"w": entry}, None, places)))
    found = read_dcp_metadata(tmp_path / ".metadata")
    assert found.tensors["w"].chunks == [((2**40 * n, 0), (2**33, 5)) for n in range(9)]
    assert sorted(found.places["w"]) == [((2**40 * n, 0), 0, 2**50 + n, 2**35) for n in range(9)]


def measure(path: Path) -> tuple[float, int]:
    """Seconds of processor time, and peak memory in MB, of `inspect` in a process of its own."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from veomni_ckpt.metadata_reader import read_dcp_metadata\n"
        "read_dcp_metadata(Path(sys.argv[1]))\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss // 1024)\n"
    )
    # through a shell: a child's peak begins with that of the process that it was forked from
    command = ["sh", "-c", '"$@"; :', "sh", sys.executable, "-c", code, str(path)]
    seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), int(peak)


def test_memory_and_time_stay_small(tmp_path: Path) -> None:
    """A tenth of 10,000 tensors x 64 shards, in about a tenth of the 5 s and 500 MB that those may take."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(synthetic(1_000, 64)))
    seconds, peak = measure(tmp_path / ".metadata")
    assert peak < 75
    assert seconds < 2  # of a busy machine; alone it is a quarter of a second


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_metadata_of_a_large_model(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(synthetic(10_000, 64)))
    seconds, peak = measure(tmp_path / ".metadata")
    assert peak < 500
    assert seconds < 5
