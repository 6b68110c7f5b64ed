from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FRESH = """
import json, sys
from pathlib import Path
from veomni_data import build_dataset, get_chat_template, multimodal_prompt
from veomni_recipes.evaluation import answer_held_out
from veomni_models import OmniProcessor
folder, data = Path(sys.argv[1]), sys.argv[2]
processor = OmniProcessor.from_pretrained(folder)
template = get_chat_template("default", processor.tokenizer)
prompt = lambda row: multimodal_prompt(row, image_token=processor.image_token, template=template)
rows = build_dataset(data, transform=prompt)
print(json.dumps([answer.text for answer in answer_held_out(folder, rows, range(len(rows)), folder.parent)]))
"""


@pytest.fixture(scope="module")
def run_folder(arguments: list[str], digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with everything at its end, started as a user does."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    lines = (digits_folder / "test.jsonl").read_text().splitlines(keepends=True)
    (digits_folder / "few.jsonl").write_text("".join(lines[340:380]))
    command = [sys.executable, "-m", "veomni_recipes.cli", "run", "train_omni_model", *arguments]
    command += [f"--train.output_dir={folder}", f"--data.eval_path={digits_folder}/few.jsonl", "--train.max_steps=40"]
    command += ["--train.save_hf_weights=true", "--train.save_steps=30", "--train.save_epochs=1"]
    command += ["--train.eval_steps=35", "--train.eval_answers=7", "--train.best_metric=accuracy"]
    env = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=110)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_a_run_leaves_all_that_it_promises(run_folder: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "loss.png", "predictions.png", "predictions.jsonl", "summary.json"} <= {
        path.name for path in run_folder.iterdir()
    }
    assert sorted(p.name for p in (run_folder / "checkpoints").iterdir()) == [
        "global_step_30",
        "global_step_35",
        "global_step_40",
    ]
    summary = json.loads((run_folder / "summary.json").read_text())
    shares = {"single_picture_accuracy", "list_accuracy", "sum_accuracy", "all_accuracy"}
    assert shares | {"seconds", "tokens", "tokens_per_second", "parameters", "steps", "world_size"} <= summary.keys()
    assert (summary["steps"], summary["world_size"]) == (40, 2)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second"} <= lines[0].keys()
    assert sum(line["tokens"] for line in lines) == summary["tokens"]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2


def test_a_validation_answers_questions_and_keeps_the_best(run_folder: Path) -> None:
    (line,) = (json.loads(line) for line in (run_folder / "validation.jsonl").read_text().splitlines())
    assert line["step"] == 35
    assert 0 < line["loss"] < 3
    assert round(line["accuracy"] * 7) == pytest.approx(line["accuracy"] * 7)
    assert json.loads((run_folder / "best.json").read_text()) == {"step": 35, "accuracy": line["accuracy"]}
    assert (run_folder / "checkpoints" / "global_step_35" / "protected").exists()
    assert not (run_folder / "validation").exists()


def test_a_run_without_a_terminal_prints_some_twenty_plain_lines_and_what_to_do_next(run_folder: Path) -> None:
    lines = (run_folder / "stdout.txt").read_text().splitlines()
    steps = [line for line in lines if line.startswith("step ") and "held-out" not in line]
    assert 15 <= len(steps) <= 25
    assert all("loss" in line and "tokens/s" in line and "lr" in line and "left" in line for line in steps)
    assert "predictions.png" in lines[-3]
    assert "hf_ckpt" in lines[-2]
    assert "ask PICTURE" in lines[-1]
    assert lines[-1].endswith(f"--run {run_folder}")


def test_a_fresh_process_gives_the_answers_of_the_run(run_folder: Path, digits_folder: Path) -> None:
    command = [sys.executable, "-c", FRESH, str(run_folder / "hf_ckpt"), f"{digits_folder}/few.jsonl"]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    predictions = [json.loads(line) for line in (run_folder / "predictions.jsonl").read_text().splitlines()]
    assert [p["row"] for p in predictions] == list(range(40))
    assert json.loads(fresh.splitlines()[-1]) == [p["text"] for p in predictions]


def test_the_answer_to_a_picture_of_ones_own_is_printed(run_folder: Path, digits_folder: Path) -> None:
    picture = next((digits_folder / "images").glob("*.png"))
    ask = [sys.executable, "-m", "veomni_recipes.cli", "ask", str(picture), "Which digit is this?"]
    done = subprocess.run([*ask, "--run", str(run_folder)], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.strip()
    ask[-2] = "nothing.png"
    done = subprocess.run([*ask, "--run", str(run_folder)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, 'picture "nothing.png" does not exist (nothing.png)\n')


def test_a_second_run_into_the_folder_moves_the_first_aside(tmp_path: Path) -> None:
    from veomni_recipes.run_folder import open_run_folder

    folder = tmp_path / "run"
    for name in ("run", "run.1", "run.2"):
        open_run_folder(folder, resume=False)
        (folder / "metrics.jsonl").write_text(name)
    assert [(tmp_path / n / "metrics.jsonl").read_text() for n in ("run.1", "run.2", "run")] == [
        "run",
        "run.1",
        "run.2",
    ]
    open_run_folder(folder, resume=True)
    assert (folder / "metrics.jsonl").exists()
