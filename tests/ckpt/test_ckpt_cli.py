"""The command `veomni-ckpt`: its exit codes, and one sentence for what a user got wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from veomni_ckpt.cli import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    state = {"model": {"model.w": torch.arange(6.0).view(2, 3), "lm_head.weight": torch.ones(2)}, "epoch": 3}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    return tmp_path / "dcp"


def test_a_whole_round(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, back = tmp_path / "hf", tmp_path / "back"
    assert main(["to-hf", str(source), str(hf)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{hf}: 2 tensors, 32 B in 1 file\n")
    assert "not of the model, left out: epoch" in out
    assert "--assets or --base-model adds them" in out
    assert main(["to-dcp", str(hf), str(back)]) == 0
    assert main(["verify", str(source), str(hf)]) == 0
    assert main(["verify", str(hf), str(back)]) == 0
    assert "equal bit by bit: 2 tensors, 32 B (model)" in capsys.readouterr().out


def test_verify_exits_with_1_and_names_the_difference(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["to-hf", str(source), str(tmp_path / "half"), "--dtype=bf16", "--quiet"]) == 0
    assert main(["verify", str(source), str(tmp_path / "half"), "--all"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "is float32 in" in lines[0]
    assert main(["verify", str(source), str(tmp_path / "half"), "--tolerance", "0.01"]) == 0


def test_inspect_prints_a_table_or_json(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(source)]) == 0
    out = capsys.readouterr().out
    assert "model.model.w         float32  [2, 3]       1  24 B" in out
    assert main(["inspect", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 8


def test_options_reach_the_conversion(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--map", "model.*=core.*", "--drop=lm_head.*", "--assets", str(tmp_path / "config.json")]
    arguments += ["--max-shard-size", "1MB", "--root", "model", "--sync"]
    assert main(["to-hf", str(source), str(tmp_path / "hf"), *arguments]) == 0
    assert "with config.json" in capsys.readouterr().out
    assert list(load_file(tmp_path / "hf" / "model.safetensors")) == ["core.w"]
    assert main(["to-hf", str(source), str(tmp_path / "hf"), "--overwrite", "--part", "head=lm_head"]) == 0
    assert list(load_file(tmp_path / "hf" / "head" / "model.safetensors")) == ["weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-hf", "SRC"], "to-hf takes a checkpoint and the name of a folder"),
        (["to-hf", "SRC", "DST", "--dtyp", "x"], "the option --dtyp is unknown: see --help"),
        (["to-hf", "SRC", "DST", "--dtype"], "--dtype takes a value"),
        (["to-hf", "SRC", "DST", "--dtype", "int4"], "dtype='int4': allowed are"),
        (["to-hf", "SRC", "DST", "--dtype=bf16", "--dtype=fp16"], "--dtype is given twice"),
        (["to-hf", "SRC", "DST", "--map", "a"], "--map a: two names with = between them"),
        (["to-hf", "SRC", "DST", "--lora-alpha", "many"], "--lora-alpha many: a number is expected"),
        (["to-hf", "SRC", "SRC"], "exists: give a name that is free"),
        (["to-hf", "absent", "DST"], "there is no absent"),
        (["to-dcp", "absent", "DST"], "there is no absent"),
        (["inspect", "absent"], "there is no absent"),
        (["inspect"], "inspect takes a checkpoint"),
        (["verify", "SRC"], "verify takes two checkpoints"),
        (["verify", "SRC", "absent"], "there is no absent"),
        (["verify", "SRC", "SRC", "--tolerance", "-1"], "tolerance=-1"),
        (["prune", "absent"], "absent cannot be read"),
        (["repair"], "repair takes a folder"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"SRC": str(source), "DST": str(tmp_path / "dst")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("veomni-ckpt: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp"]


def test_help_needs_no_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "Exit codes: 0 done" in capsys.readouterr().out
    for command, option in (("to-hf", "--merge-lora"), ("to-dcp", "--root"), ("verify", "--tolerance")):
        assert main([command, "--help"]) == 0
        assert option in capsys.readouterr().out
    assert main([]) == 2
    assert main(["convert"]) == 2
    assert "'convert' is no command" in capsys.readouterr().err


def test_prune_lists_before_it_deletes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (".global_step_1.partial", ".global_step_2.replaced"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    assert main(["prune", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / '.global_step_2.replaced'}: replaced, 0 B, the only whole copy: use repair" in out
    assert "1 can go: give --delete" in out
    assert len(list(tmp_path.iterdir())) == 2
    assert main(["repair", str(tmp_path)]) == 0
    assert main(["prune", str(tmp_path), "--delete"]) == 0
    assert "1 deleted" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_2"]


def test_names_of_a_strange_file_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"w\x1b[31m\nx": torch.ones(1)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    assert main(["inspect", str(tmp_path / "dcp")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_the_command_starts_without_torch(source: Path) -> None:
    code = (
        "import sys; from veomni_ckpt.cli import main; main(sys.argv[1:]); print({'torch', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, "inspect", str(source)], capture_output=True, text=True)
    assert run.stdout.endswith("set()\n"), run.stderr


def test_all_public_names_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import veomni_ckpt

    for name in veomni_ckpt.__all__:
        value = getattr(veomni_ckpt, name)
        assert value.__module__.startswith("veomni_ckpt."), name
        assert callable(value), name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        veomni_ckpt.absent  # noqa: B018
