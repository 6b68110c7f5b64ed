"""Sounds through the whole recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from veomni_recipes.configs.multimodal.omni import spoken_digits
from veomni_recipes.tasks.omni.train_omni_model import main

CONFIG = Path(spoken_digits.__file__).with_name("spoken_digits.yaml")


def made_up() -> list[tuple[int, np.ndarray]]:
    """Coefficients as the package has them, but random: the same for each digit, with noise."""
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 10, 60)
    words = {digit: rng.normal(size=(12, 13)) * 20 for digit in range(10)}
    return [(int(digit), words[digit] + rng.normal(size=(12, 13))) for digit in digits]


def test_sounds_become_conversations_a_model_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken_digits, "load_recordings", made_up)
    monkeypatch.setattr(spoken_digits, "TRAINING_SAMPLES", 200)
    data, run = tmp_path / "data", tmp_path / "run"
    spoken_digits.main(data)
    main(
        [
            str(CONFIG),
            f"--data.train_path={data}/train.jsonl",
            f"--data.eval_path={data}/test.jsonl",
            f"--model.tokenizer_path={data}/tokenizer",
            f"--train.output_dir={run}",
            "--data.max_seq_len=256",
            "--data.train_size=6000",
            "--train.max_steps=6",
        ]
    )
    assert {"hf_ckpt", "loss.png", "predictions.png", "predictions.jsonl"} <= {path.name for path in run.iterdir()}
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    sound = next((data / "sounds").glob("*.wav"))
    ask = [sys.executable, "-m", "veomni_recipes.cli", "ask", str(sound), "Which digit is this?", "--run", str(run)]
    done = subprocess.run(ask, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_that_were_not_trained_on_are_understood(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    spoken_digits.main(data)
    command = [sys.executable, "-m", "veomni_recipes.cli", "run", "train_omni_model", str(CONFIG)]
    command += [f"--data.train_path={data}/train.jsonl", f"--data.eval_path={data}/test.jsonl"]
    command += [f"--model.tokenizer_path={data}/tokenizer", f"--train.output_dir={run}"]
    subprocess.run(command, check=True)
    scores = json.loads((run / "summary.json").read_text())
    assert scores["single_sound_accuracy"] >= 0.9  # chance is 0.1
