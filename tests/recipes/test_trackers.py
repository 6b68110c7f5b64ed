from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from veomni_config import RecipeConfig, parse_args
from veomni_recipes.trackers import Trackers


def config(folder: Path, *more: str) -> RecipeConfig:
    arguments = ["--data.train_path=d", f"--train.output_dir={folder}", "--model.config_path=c", *more]
    return parse_args(RecipeConfig, arguments)


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "losses": {"text": 0.5 / step}, "note": "no number", "skipped": True}


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_numbers_and_a_run_that_goes_on_drops_what_came_later(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    cfg = config(tmp_path, "--train.trackers=[tensorboard]")
    for first, after in ((0, 5), (3, 6)):
        trackers = Trackers(cfg, tmp_path, step=first)
        for step in range(first + 1, after):
            trackers.log(line(step))
        trackers.log({"step": after - 1, "loss": 9.0}, "validation")
        trackers.close()
    found = read_events(tmp_path / "tensorboard")
    assert found.keys() == {"train/loss", "train/losses/text", "validation/loss"}
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5]
    assert found["train/losses/text"][1] == (2, pytest.approx(0.25))
    assert found["validation/loss"] == [(5, 9.0)]


def test_wandb_writes_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = config(tmp_path, "--train.use_wandb=true", "--train.wandb_name=mine")
    said: list[str] = []
    ids: list[str] = []
    for step in (0, 2):
        trackers = Trackers(cfg, tmp_path, step=step, say=said.append)
        trackers.log(line(step + 1))
        trackers.close()
        assert said == []
        ids.append((tmp_path / "wandb" / "run_id").read_text())
    assert ids[0] == ids[1]
    files = [*(tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert [ids[0] in file.name for file in files] == [True, True]
    assert b"train/losses/text" in files[0].read_bytes().replace(b"\x00", b"")


def test_trackio_keeps_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    script = """
import sys
from pathlib import Path
from veomni_config import RecipeConfig, parse_args
from veomni_recipes.trackers import Trackers
folder, step = Path(sys.argv[1]), int(sys.argv[2])
more = [f"--train.output_dir={folder}", "--train.trackers=[trackio]", "--data.train_path=d", "--model.config_path=c"]
trackers = Trackers(parse_args(RecipeConfig, more), folder, step=step, say=sys.exit)
trackers.log({"step": step + 1, "losses": {"text": 0.5}})
trackers.close()
"""
    where = os.environ | {"TRACKIO_DIR": str(tmp_path / "db")}  # read when it is imported
    for step in ("0", "2"):
        subprocess.run([sys.executable, "-c", script, tmp_path, step], env=where, check=True, timeout=120)
    with closing(sqlite3.connect(tmp_path / "db" / "VeOmni.db")) as database:
        rows = [*database.execute("select run_name, step, metrics from metrics order by step")]
    name = (tmp_path / "trackio" / "run_name").read_text()
    assert [(run, step) for run, step, _ in rows] == [(name, 1), (name, 3)]
    assert [json.loads(numbers) for *_, numbers in rows] == [{"train/losses/text": 0.5}] * 2


def test_a_tracker_that_is_not_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    said: list[str] = []
    trackers = Trackers(config(tmp_path, "--train.trackers=[tensorboard]"), tmp_path, say=said.append)
    assert said == ["tensorboard is left out, it is not installed (tensorboard): pip install tensorboard"]
    trackers.log(line(1))
    trackers.close()
    assert len(said) == 1


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")

    def broken(*_: Any) -> Any:
        class Broken:
            def log(self, step: int, numbers: Any) -> None:
                raise OSError(28, "No space left\non device")

        return Broken()

    monkeypatch.setattr("veomni_recipes.trackers._open_wandb", broken)
    said: list[str] = []
    cfg = config(tmp_path, "--train.trackers=[wandb,tensorboard]")
    trackers = Trackers(cfg, tmp_path, say=said.append)
    for step in (1, 2):
        trackers.log(line(step))
    trackers.close()
    assert said == [
        "wandb is left out from here on, it has failed: OSError: [Errno 28] No space left on device",
    ]
    assert len(read_events(tmp_path / "tensorboard")["train/loss"]) == 2


def test_other_ranks_have_none(tmp_path: Path) -> None:
    trackers = Trackers(config(tmp_path, "--train.trackers=[tensorboard]"), tmp_path, on=False)
    trackers.log(line(1))
    trackers.close()
    assert not [*tmp_path.iterdir()]


def test_a_tracker_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.trackers.*(tensorboard|wandb)"):
        config(tmp_path, f"--train.trackers={json.dumps(['tensorbord'])}")
