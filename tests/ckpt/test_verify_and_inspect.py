"""`verify` finds the first difference of any two formats, `inspect` lists them, `to-dcp` makes what torch loads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from veomni_ckpt import CheckpointError, dcp_to_hf, hf_to_dcp, inspect, verify
from veomni_ckpt.inspection import format_inspection, format_size

from tests.ckpt.saved_layouts import whole_tensors

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.bfloat16),
    "c.count": torch.tensor(7),
}


def save_hf(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_dcp(tensors: dict[str, torch.Tensor], folder: Path, optimizer: float = 0.0) -> Path:
    state = {"model": tensors, "optimizer": {"exp_avg": torch.full((3,), optimizer)}, "epoch": 1}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def test_any_two_formats_are_compared(saved: Path, tmp_path: Path) -> None:
    save_hf({name: tensor.contiguous() for name, tensor in whole_tensors().items()}, tmp_path / "hf")
    ways = [saved / "plain", saved / "ranks", tmp_path / "hf", tmp_path / "hf" / "model.safetensors"]
    for one in ways:
        for other in ways:
            found = verify(one, other)
            assert found.equal, found.differences
            assert found.tensors == len(whole_tensors())


def test_the_first_difference_is_named_with_its_values(tmp_path: Path) -> None:
    ours = save_dcp(TENSORS, tmp_path / "dcp")
    changed = {name: tensor.clone() for name, tensor in TENSORS.items()}
    changed["a.weight"][1, 2] = 6.25
    changed["c.count"] += 1
    other = save_hf(changed, tmp_path / "hf")
    found = verify(ours, other)
    assert not found.equal
    assert found.differences == [f"a.weight[1, 2] is 6 in {ours} and 6.25 in {other}"]
    assert verify(ours, other, limit=9).differences[1] == f"c.count is 7 in {ours} and 8 in {other}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight": torch.zeros(4, 3)}, r"a\.weight is \[3, 4\] in .*dcp and \[4, 3\] in .*hf"),
        ({"a.weight": TENSORS["a.weight"].double()}, r"a\.weight is float32 in .* and float64 in"),
        ({"d.extra": torch.zeros(1)}, r"d\.extra is in .*hf and not in .*dcp"),
        ({"a.weight": None}, r"a\.weight is in .*dcp and not in .*hf"),
    ],
)
def test_other_shapes_types_and_names_are_differences(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    changed = {name: tensor for name, tensor in (TENSORS | change).items() if tensor is not None}
    found = verify(save_dcp(TENSORS, tmp_path / "dcp"), save_hf(changed, tmp_path / "hf"))
    assert len(found.differences) == 1
    assert re.search(message, found.differences[0])


def test_within_a_tolerance_values_and_types_may_differ(tmp_path: Path) -> None:
    one = save_hf(TENSORS, tmp_path / "one")
    near = {"a.weight": TENSORS["a.weight"].double() + 1e-4, "b.weight": TENSORS["b.weight"].float()}
    other = save_hf({**near, "c.count": TENSORS["c.count"]}, tmp_path / "other")
    assert not verify(one, other).equal
    assert verify(one, other, tolerance=1e-3).equal
    far = verify(one, other, tolerance=1e-6)
    assert far.differences == [f"a.weight[0, 0] is 0 in {one} and 0.0001 in {other}"]
    half = save_hf({**TENSORS, "b.weight": torch.tensor([1.5, 0.0, 1.0], dtype=torch.bfloat16)}, tmp_path / "half")
    assert verify(one, half, tolerance=1.0).differences == [f"b.weight[1] is nan in {one} and 0 in {half}"]
    with pytest.raises(CheckpointError, match="tolerance=-1"):
        verify(one, other, tolerance=-1)


def test_optimizer_state_counts_where_both_have_it(tmp_path: Path) -> None:
    one, other = save_dcp(TENSORS, tmp_path / "one"), save_dcp(TENSORS, tmp_path / "other", optimizer=1.0)
    found = verify(one, other)
    assert found.differences == [f"optimizer.exp_avg[0] is 0 in {one} and 1 in {other}"]
    assert (found.scope, found.not_compared) == ("all tensors", ["epoch"])
    assert verify(one, save_hf(TENSORS, tmp_path / "hf")).scope == "model"


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    one = save_hf({"w": torch.zeros(70_000, dtype=torch.int16)}, tmp_path / "one")
    data = bytearray((one / "model.safetensors").read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for element in (0, 1, 65_535, 69_999):
        changed = bytearray(data)
        changed[begin + 2 * element] ^= 4
        other = tmp_path / f"other{element}.safetensors"
        other.write_bytes(changed)
        assert verify(one, other).differences == [f"w[{element}] is 0 in {one} and 4 in {other}"]


def test_inspect_lists_tensors_files_and_extra_state(tmp_path: Path) -> None:
    folder = save_dcp(TENSORS, tmp_path / "dcp")
    (folder / "extra_state.json").write_text("{}")
    found = inspect(folder)
    lines = {line.name: line for line in found.tensors}
    assert lines["model.a.weight"].shape == (3, 4)
    assert (lines["model.a.weight"].dtype, lines["model.a.weight"].nbytes) == ("float32", 48)
    assert lines["model.a.weight"].own_name == "a.weight"
    assert lines["optimizer.exp_avg"].own_name is None
    assert (found.objects, found.extra_state) == (["epoch"], ["extra_state.json"])
    assert found.parameters == 12 + 3 + 1
    assert json.loads(found.to_json())["tensors"][0]["shape"] in ([3, 4], [3], [])
    text = format_inspection(found)
    assert "not tensors: epoch" in text
    assert "extra state: extra_state.json" in text
    assert "16 elements are the model's" in text


def test_inspect_counts_shards_and_reads_no_data(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "plain", tmp_path / "plain")
    for file in (tmp_path / "plain").glob("*.distcp"):
        size = file.stat().st_size
        file.write_bytes(b"")
        with file.open("r+b") as stream:
            stream.truncate(size)  # right sizes, no content
    shards = {line.name: line.shards for line in inspect(tmp_path / "plain").tensors}
    assert (shards["model.rows"], shards["model.grid"], shards["model.replicated"]) == (4, 4, 1)
    with pytest.raises(CheckpointError, match=r"distcp has no readable \S+ at byte \d+: "):
        dcp_to_hf(tmp_path / "plain", tmp_path / "hf")


def test_every_format_is_inspected(saved: Path, tmp_path: Path) -> None:
    kinds = {
        "plain": "DCP folder",
        "ranks": "DCP folder with metadata of each rank",
        "hf_shards": "safetensors shards of torch's HuggingFaceStorageWriter",
        "safetensors": "DCP folder",
    }
    for writer, kind in kinds.items():
        found = inspect(saved / writer)
        assert found.kind == kind
        shapes = {line.own_name: line.shape for line in found.tensors}
        assert all(shapes[name] == tuple(tensor.shape) for name, tensor in whole_tensors().items() if name in shapes)
    single = save_hf(TENSORS, tmp_path / "hf")
    assert inspect(single).kind == "Hugging Face folder"
    assert inspect(single / "model.safetensors").kind == "safetensors file"


def test_a_folder_of_checkpoints_says_which_to_give(tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / f"global_step_{step}").mkdir()
    with pytest.raises(CheckpointError, match=r"give one of its checkpoints, such as .*global_step_10"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match="there is no "):
        inspect(tmp_path / "absent")


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1_510_000_000, "1.51 GB"), (10**13, "10 TB")])
def test_sizes_are_readable(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("root", ["model", "", "app.model"])
def test_torch_loads_what_to_dcp_makes(tmp_path: Path, root: str) -> None:
    source = save_hf(TENSORS, tmp_path / "hf")
    hf_to_dcp(source, tmp_path / "dcp", root=root)
    flat = {f"{root}.{name}" if root else name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(flat, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(flat[f"{root}.{name}" if root else name], tensor, rtol=0, atol=0, equal_nan=True)
    assert verify(tmp_path / "dcp", source).equal
    dcp_to_hf(tmp_path / "dcp", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == TENSORS.keys()


def test_to_dcp_makes_files_of_a_limited_size_that_all_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veomni_ckpt.to_dcp._FILE_BYTES", 100)
    source = save_hf(TENSORS, tmp_path / "hf")
    hf_to_dcp(source, tmp_path / "dcp")
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == len(TENSORS)
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(state["model"]["a.weight"], TENSORS["a.weight"])
    assert verify(tmp_path / "dcp", source).equal


def test_to_dcp_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Beside torch itself: 20 tensors of 20 MB in less than 100 MB."""
    save_hf({f"w{number}": torch.zeros(5_000_000) for number in range(20)}, tmp_path / "hf")
    code = (
        "import resource, sys, torch.distributed.checkpoint, veomni_ckpt\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); veomni_ckpt.hf_to_dcp(*sys.argv[1:]); print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "hf"), str(tmp_path / "dcp")]
    # a child's peak begins with its parent's, which has torch: start it from a small one
    shell = subprocess.run(["sh", "-c", '"$@"; :', "sh", *command], capture_output=True, text=True)
    assert int(shell.stdout) < 100, shell.stderr


def test_to_dcp_converts_and_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    source = save_hf(TENSORS, tmp_path / "hf")
    hf_to_dcp(source, tmp_path / "dcp", dtype="bfloat16")
    kinds = {line.own_name: line.dtype for line in inspect(tmp_path / "dcp").tensors}
    assert kinds == {"a.weight": "bfloat16", "b.weight": "bfloat16", "c.count": "int64"}
    with pytest.raises(CheckpointError, match="dcp exists"):
        hf_to_dcp(source, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match="dtype='int8' is no floating-point type"):
        hf_to_dcp(source, tmp_path / "other", dtype="int8")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        hf_to_dcp(source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "hf"]
