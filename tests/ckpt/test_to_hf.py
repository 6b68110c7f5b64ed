"""`dcp_to_hf`: whatever the writer, the mesh and the strides were, the bytes come out right and under right names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from veomni_ckpt import CheckpointError, dcp_to_hf, inspect, verify

from tests.ckpt.saved_layouts import Tensors, whole_tensors

WRITERS = ("plain", "files", "threads", "ranks", "zstd", "safetensors", "hf_shards")
TRAINERS = ("app", "accelerate/pytorch_model_fsdp_0", "veomni", "torchtitan", "flat", "wrapped")


def save_alone(state: dict[str, Any], folder: Path) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def load_folder(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other) if tensor.numel()]
    return not raw or torch.equal(*raw)


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not same_bits(got[name], tensor)] == []


@pytest.mark.parametrize("writer", WRITERS)
def test_every_layout_comes_out_bit_by_bit(saved: Path, tmp_path: Path, writer: str) -> None:
    if writer == "zstd":
        pytest.importorskip("zstandard")
    done = dcp_to_hf(saved / writer, tmp_path / "hf")
    expected = whole_tensors()
    if writer in ("safetensors", "hf_shards"):
        expected = {name: value for name, value in expected.items() if name in load_folder(tmp_path / "hf")}
        assert len(expected) >= len(whole_tensors()) - 5
    assert_same(load_folder(tmp_path / "hf"), expected)
    assert done.tensors == len(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_small_blocks_change_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of cutting a tensor into blocks: parts of a row, whole rows, more slices than one call takes."""
    for module in ("to_hf", "file_writer"):
        monkeypatch.setattr(f"veomni_ckpt.{module}.BLOCK", 64)
    monkeypatch.setattr("veomni_ckpt.tensor_reader._MAX_SLICES", 2)
    dcp_to_hf(saved / "plain", tmp_path / "hf")
    assert_same(load_folder(tmp_path / "hf"), whole_tensors())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_checkpoints_of_other_trainers_convert(trained: tuple[Path, Tensors], tmp_path: Path, trainer: str) -> None:
    folder, expected = trained
    done = dcp_to_hf(folder / trainer, tmp_path / "hf")
    assert_same(load_folder(tmp_path / "hf"), expected)
    assert bool(done.left_out) == (trainer in ("app", "veomni", "torchtitan"))


def test_an_optimizer_alone_is_no_model(trained: tuple[Path, Tensors], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor that is a model's: its names begin with optimizer"):
        dcp_to_hf(trained[0] / "accelerate" / "optimizer_0", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_is_left_out_where_the_config_says_so(trained: tuple[Path, Tensors], tmp_path: Path) -> None:
    folder, expected = trained
    config = tmp_path / "config.json"
    for says, count in ((True, len(expected) - 1), (False, len(expected))):
        config.write_text(json.dumps({"tie_word_embeddings": says}))
        done = dcp_to_hf(folder / "flat", tmp_path / f"hf{says}", assets=config)
        assert done.tensors == count
        assert done.tied == (["lm_head.weight"] if says else [])
        assert verify(folder / "flat", tmp_path / f"hf{says}").equal


def test_a_head_that_has_other_bytes_stays(tmp_path: Path) -> None:
    state = {"embed_tokens.weight": torch.zeros(4, 2), "lm_head.weight": torch.ones(4, 2)}
    (tmp_path / "config.json").write_text('{"text_config": {"tie_word_embeddings": true}}')
    save_alone(state, tmp_path / "dcp")
    dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", assets=tmp_path / "config.json")
    assert_same(load_folder(tmp_path / "hf"), state)


@pytest.mark.parametrize("dtype", ["bf16", "float16", "torch.float32", torch.float64])
def test_conversion_rounds_as_torch_does(saved: Path, tmp_path: Path, dtype: Any) -> None:
    dcp_to_hf(saved / "plain", tmp_path / "hf", dtype=dtype)
    target = {"bf16": torch.bfloat16, "float16": torch.float16, "torch.float32": torch.float32}.get(dtype, dtype)
    for name, got in load_folder(tmp_path / "hf").items():
        expected = whole_tensors()[name]
        if not expected.is_floating_point():
            assert same_bits(got, expected)
            continue
        assert got.dtype == target
        expected = expected.to(target)
        nan = expected.isnan()
        assert torch.equal(got.isnan(), nan)
        assert same_bits(torch.where(nan, 0, got), torch.where(nan, 0, expected)), name
        if target == torch.bfloat16 and whole_tensors()[name].dtype != torch.bfloat16:
            assert set(got[nan].view(torch.uint16).tolist()) <= {0x7FC0, 0xFFC0}


def test_a_conversion_says_its_type_in_the_config(saved: Path, tmp_path: Path) -> None:
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "hidden_size": 4}, "name": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    dcp_to_hf(saved / "plain", tmp_path / "hf", dtype="bfloat16", assets=[tmp_path / "config.json"])
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written == {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "hidden_size": 4}, "name": "x"}


def test_files_keep_to_their_size_and_the_index_knows_them(saved: Path, tmp_path: Path) -> None:
    done = dcp_to_hf(saved / "plain", tmp_path / "hf", max_shard_size=1000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    expected = whole_tensors()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values()) == done.nbytes
    assert index["weight_map"].keys() == expected.keys()
    for file in done.files:
        with safe_open(tmp_path / "hf" / file, framework="pt") as opened:
            names = list(opened.keys())
            assert opened.metadata() == {"format": "pt"}
        assert all(index["weight_map"][name] == file for name in names)
        assert len(names) == 1 or sum(expected[name].nbytes for name in names) <= 1000
    assert_same(load_folder(tmp_path / "hf"), expected)


def test_every_tensor_is_aligned_to_its_elements(saved: Path, tmp_path: Path) -> None:
    dcp_to_hf(saved / "plain", tmp_path / "hf")
    raw = (tmp_path / "hf" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 4096 == 0
    header = json.loads(raw[8 : 8 + length])
    expected = whole_tensors()
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % expected[name].dtype.itemsize == 0, name


def test_assets_come_from_the_checkpoint_its_run_a_folder_or_a_base_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = save_alone({"w": torch.ones(2)}, run / "checkpoints" / "global_step_5")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "extra_state.json", "notes.txt"):
        (step / name).write_text("{}")
    assert dcp_to_hf(step, tmp_path / "a").assets == ["chat_template.jinja", "config.json", "tokenizer.json"]
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (step / name).unlink()
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"from": "base"}')
    save_file({"other": torch.ones(1)}, base / "model.safetensors")
    assert dcp_to_hf(step, tmp_path / "b", base_model=base).assets == ["config.json"]
    assert list(load_folder(tmp_path / "b")) == ["w"]
    (run / "model_assets").mkdir()
    (run / "model_assets" / "generation_config.json").write_text("{}")
    assert dcp_to_hf(step, tmp_path / "c", base_model=base).assets == ["generation_config.json"]
    assert dcp_to_hf(step, tmp_path / "d", assets=[base / "config.json", run / "model_assets"]).assets == [
        "config.json",
        "generation_config.json",
    ]
    with pytest.raises(CheckpointError, match="neither a file nor a folder with a config"):
        dcp_to_hf(step, tmp_path / "e", assets=tmp_path / "absent")


def test_names_are_mapped_and_dropped_by_globs(tmp_path: Path) -> None:
    names = ("model.backbone.0.a", "model.backbone.1.b", "model.head.w", "model.rope.inv_freq")
    save_alone({"model": {name: torch.full((2,), n) for n, name in enumerate(names)}}, tmp_path / "dcp")
    key_map = {"model.*.*.a": "*.first_*", "model.backbone.*": "layers.*", "*.inv_freq": None}
    dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", key_map=key_map)
    got = {name: int(tensor[0]) for name, tensor in load_folder(tmp_path / "hf").items()}
    assert got == {"backbone.first_0": 0, "layers.1.b": 1, "model.head.w": 2}
    for wrong, message in (
        ({"absent.*": "x.*"}, r"'absent\.\*' fits no tensor; names look like model\.backbone\.0\.a"),
        ({"*": "same"}, "would both be called same"),
        ({"model.*": "*.*"}, "more \\* on the right"),
    ):
        with pytest.raises(CheckpointError, match=message):
            dcp_to_hf(tmp_path / "dcp", tmp_path / "wrong", key_map=wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "hf"]


def test_the_model_is_looked_for_where_root_says(tmp_path: Path) -> None:
    both = {"policy": {"model": {"w": torch.ones(1)}}, "value": {"model": {"w": torch.zeros(1)}}}
    save_alone(both, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=r"more than one model, at policy\.model and value\.model"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "hf")
    dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", root="value.model")
    assert_same(load_folder(tmp_path / "hf"), {"w": torch.zeros(1)})


def test_an_omni_model_splits_into_its_parts(tmp_path: Path) -> None:
    names = ("foundation.model.w", "encoders.image.v", "projectors.image.p", "scale")
    save_alone({"model": {name: torch.full((2,), n) for n, name in enumerate(names)}}, tmp_path / "dcp")
    config = {"text_config": {"hidden_size": 4}, "encoders": {"image": {"config": {"depth": 2}, "merge_size": 1}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", split_parts=True, assets=tmp_path / "config.json")
    for folder, name in (
        ("foundation", "model.w"),
        ("encoders/image", "v"),
        ("projectors/image", "p"),
        ("rest", "scale"),
    ):
        assert list(load_folder(tmp_path / "hf" / folder)) == [name]
    assert json.loads((tmp_path / "hf/foundation/config.json").read_text()) == {"hidden_size": 4}
    assert json.loads((tmp_path / "hf/encoders/image/config.json").read_text()) == {"depth": 2}
    assert json.loads((tmp_path / "hf/config.json").read_text()) == config
    dcp_to_hf(tmp_path / "dcp", tmp_path / "named", split_parts={"tower": "encoders.image"})
    assert list(load_folder(tmp_path / "named" / "tower")) == ["v"]
    assert len(load_folder(tmp_path / "named" / "rest")) == 3
    for parts, message in (
        ({"x": "absent"}, r"no tensor begins with 'absent\.'"),
        ({"../x": "scale"}, "no folder below"),
    ):
        with pytest.raises(CheckpointError, match=message):
            dcp_to_hf(tmp_path / "dcp", tmp_path / "wrong", split_parts=parts)


def test_a_hugging_face_folder_is_a_source_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = {"a": torch.randn(5, 3), "b": torch.arange(4)}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    dcp_to_hf(source, tmp_path / "hf", dtype="float16")
    assert_same(load_folder(tmp_path / "hf"), {"a": tensors["a"].half(), "b": tensors["b"]})


def test_what_exists_is_replaced_only_when_that_is_asked_for(tmp_path: Path) -> None:
    save_alone({"w": torch.ones(2)}, tmp_path / "dcp")
    dcp_to_hf(tmp_path / "dcp", tmp_path / "hf")
    save_alone({"w": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="hf exists: give a name that is free, or overwrite"):
        dcp_to_hf(tmp_path / "other", tmp_path / "hf")
    assert_same(load_folder(tmp_path / "hf"), {"w": torch.ones(2)})
    for sync in (False, True):
        dcp_to_hf(tmp_path / "other", tmp_path / "hf", overwrite=True, sync=sync)
        assert_same(load_folder(tmp_path / "hf"), {"w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"dcp exists: give a name that is free$"):
        dcp_to_hf(tmp_path / "other", tmp_path / "dcp", overwrite=True)
    (tmp_path / "empty").mkdir()
    dcp_to_hf(tmp_path / "other", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "empty", "hf", "other"]


def run_and_kill(source: Path, target: Path, files: int) -> None:
    """Start a conversion in a process of its own and kill it once `files` are finished."""
    slow = (
        "import sys, time, veomni_ckpt\n"
        "veomni_ckpt.dcp_to_hf(sys.argv[1], sys.argv[2], max_shard_size=1000, progress=lambda *_: time.sleep(0.01))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, str(source), str(target)])
    journal = target.with_name(f".{target.name}.partial") / "conversion.json"
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if journal.exists() and len(json.loads(journal.read_text())["finished"]) >= files:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_conversion_goes_on_where_it_was(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    run_and_kill(saved / "plain", target, files=5)
    assert not target.exists()
    partial = tmp_path / ".hf.partial"
    finished = json.loads((partial / "conversion.json").read_text())["finished"]
    times = {name: (partial / name).stat().st_mtime_ns for name in finished}
    dcp_to_hf(saved / "plain", target, max_shard_size=1000)
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == times
    assert_same(load_folder(target), whole_tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_killed_conversion_of_something_else_is_begun_anew(saved: Path, tmp_path: Path) -> None:
    run_and_kill(saved / "plain", tmp_path / "hf", files=5)
    dcp_to_hf(saved / "plain", tmp_path / "hf", dtype="float16", max_shard_size=1000)
    assert load_folder(tmp_path / "hf")["rows"].dtype == torch.float16
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_two_conversions_to_one_name_do_not_mix(saved: Path, tmp_path: Path) -> None:
    answers: list[str] = []

    def again(done: int, total: int) -> None:
        if not answers:
            with pytest.raises(CheckpointError, match="another conversion is writing") as caught:
                dcp_to_hf(saved / "plain", tmp_path / "hf")
            answers.append(str(caught.value))

    dcp_to_hf(saved / "plain", tmp_path / "hf", progress=again)
    assert answers
    assert_same(load_folder(tmp_path / "hf"), whole_tensors())


def test_a_full_disk_is_one_sentence_and_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, veomni_ckpt\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: veomni_ckpt.dcp_to_hf(sys.argv[1], sys.argv[2])\n"
        "except veomni_ckpt.CheckpointError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(saved / "plain"), str(tmp_path / "hf")], capture_output=True, text=True
    )
    assert "hf was not written (" in run.stdout, run.stderr
    assert list(tmp_path.iterdir()) == []


def test_neither_torch_nor_numpy_is_imported_for_a_copy(tmp_path: Path) -> None:
    save_alone({"model": {"w": torch.randn(30, 40)}, "epoch": 3}, tmp_path / "dcp")
    code = "import sys, veomni_ckpt; veomni_ckpt.dcp_to_hf(*sys.argv[1:]); print({'torch', 'numpy'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "dcp"), str(tmp_path / "hf")], capture_output=True, text=True
    )
    assert run.stdout == "set()\n", run.stderr


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Under 64 MB for 400 MB, half of it to be put together from columns."""
    code = (
        "import resource, sys, veomni_ckpt\n"
        "veomni_ckpt.dcp_to_hf(*sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    wide = torch.zeros(50_000, 1000, dtype=torch.float32)
    save_alone({"a": wide, "b": wide.clone()}, tmp_path / "dcp")
    command = [sys.executable, "-c", code, str(tmp_path / "dcp"), str(tmp_path / "hf")]
    # a child's peak begins with its parent's, which has torch: start it from a small one
    shell = subprocess.run(["sh", "-c", '"$@"; :', "sh", *command], capture_output=True, text=True)
    assert int(shell.stdout) < 64, shell.stderr


def test_what_safetensors_has_no_type_for_is_named(tmp_path: Path) -> None:
    save_alone({"w": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match="w is complex128, which a safetensors file cannot hold"):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "hf")
    assert inspect(tmp_path / "dcp").tensors[0].dtype == "complex128"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8': allowed are float64, float32, float16, bfloat16"),
        ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples' is no size"),
        ({"root": "absent"}, "has no tensor below 'absent': its names begin with w"),
        ({"lora_alpha": 8.0}, "lora_alpha is for merging"),
        ({"merge_lora": True}, "has no LoRA adapter to merge"),
        ({"split_parts": True}, "it has no parts of an omni model"),
        ({"base_model": "absent"}, "there is no absent"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    save_alone({"w": torch.zeros(2)}, tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=message):
        dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


def test_zip64_items_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of 4 GB and more use other fields of the archive; here a small one is written so."""
    import io
    import zipfile

    from veomni_ckpt.saved_item import locate

    saved = io.BytesIO()
    torch.save(torch.arange(6, dtype=torch.int16).view(2, 3), saved)
    rewritten = io.BytesIO()
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(rewritten, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            with new.open(entry.filename, "w", force_zip64=True) as member:
                member.write(old.read(entry))
    assert b"PK\x06\x06" in rewritten.getvalue()
    path = tmp_path / "item"
    path.write_bytes(b"before" + rewritten.getvalue())
    descriptor = os.open(path, os.O_RDONLY)
    stored = locate(descriptor, 6, len(rewritten.getvalue()), {})
    os.close(descriptor)
    assert (stored.shape, stored.strides) == ((2, 3), (3, 1))
    values = np.frombuffer(path.read_bytes(), "<i2", count=6, offset=stored.begin)
    assert values.tolist() == list(range(6))
