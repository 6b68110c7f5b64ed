"""What a user got wrong ends with exit code 2 and one sentence, on all ranks, without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from veomni_recipes.tasks.omni import train_omni_model


def run(arguments: list[str], folder: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "veomni_recipes.cli", "run", "train_omni_model", *arguments]
    env = {**os.environ, "NPROC_PER_NODE": str(ranks), "OMP_NUM_THREADS": "1"}
    command += [f"--train.output_dir={folder}", "--train.max_steps=3"]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)


def check(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert all(part in lines[0] for part in parts), lines[0]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("--data.train_path=nowhere/train.jsonl", ["nowhere/train.jsonl", "does not exist"]),
        ("--train.lr_decay_styl=cosine", ["--train.lr_decay_styl", "did you mean --train.lr_decay_style"]),
        ("--model.tokenizer_path=nowhere", ["nowhere", "no such folder"]),
        ("--model.foundation.hiden_size=64", ["hiden_size", "did you mean hidden_size"]),
    ],
)
def test_before_the_first_step(
    change: str, parts: list[str], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        train_omni_model.main([*arguments, change, f"--train.output_dir={tmp_path}/run"])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines[0]
    assert not (tmp_path / "run").exists()


def test_on_ranks_it_is_told_once(arguments: list[str], tmp_path: Path) -> None:
    done = run([*arguments, "--train.global_batch_size=3"], tmp_path / "run")
    check(done, "train.global_batch_size", "3", "world size 2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["broken picture", pytest.param("no placeholder", marks=pytest.mark.slow)])
def test_in_the_data_names_file_and_line(fault: str, arguments: list[str], digits_folder: Path, tmp_path: Path) -> None:
    lines = (digits_folder / "train.jsonl").read_text().splitlines()[:200]
    (tmp_path / "images").symlink_to(digits_folder / "images")
    bad = json.loads(lines[7])
    if fault == "no placeholder":
        bad["messages"][0]["content"] = bad["messages"][0]["content"].replace("<image>", "", 1)
        expected = "train.jsonl:8: "
    else:
        bad["images"] = ["broken.png"] * len(bad["images"])
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 40)
        expected = "broken.png"
    lines[7] = json.dumps(bad)
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    changes = [f"--data.train_path={tmp_path}/train.jsonl", "--data.max_skipped=0"]
    done = run([*arguments, *changes], tmp_path / "run")
    check(done, f"{tmp_path}/train.jsonl:8: ", expected)


def test_asking_without_a_model(tmp_path: Path) -> None:
    ask = [
        sys.executable,
        "-m",
        "veomni_recipes.cli",
        "ask",
        "nothing.png",
        "Which digit is this?",
        "--run",
        str(tmp_path),
    ]
    done = subprocess.run(ask, capture_output=True, text=True)
    check(done, str(tmp_path), "holds no trained model")
