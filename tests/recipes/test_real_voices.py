"""Recordings of people as they are through the whole recipe: which language is spoken."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from veomni_recipes.configs.multimodal.omni import spoken_digits
from veomni_recipes.configs.multimodal.omni.digits import train_tokenizer
from veomni_recipes.tasks.omni.train_omni_model import main

LANGUAGES = {"en": "english", "es": "spanish", "it": "italian", "ru": "russian"}
"""Of Debian packages of telephone announcements (CC BY-SA), 8 kHz WAV; each has one voice."""


def recordings(folder: Path, language: str) -> list[Path]:
    """The announcements of a language that are at least a second long; skips where there is no Debian mirror."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("Debian's apt-get and dpkg, which fetch the recordings")
    command = ["apt-get", "download", "-qq", f"asterisk-core-sounds-{language}-wav"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode:
        pytest.skip(f"Debian's package {command[-1]}: run apt-get update")
    package = next(folder.glob(f"asterisk-core-sounds-{language}-wav*.deb"))
    subprocess.run(["dpkg", "-x", package, folder / language], check=True)
    second = 2 * 8_000
    return sorted(path for path in (folder / language).rglob("*.wav") if path.stat().st_size > second)


def conversations(paths: dict[str, list[Path]], count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        language = rng.choice(list(paths))
        messages = [
            {"role": "user", "content": "<audio>Which language is this?"},
            {"role": "assistant", "content": LANGUAGES[language]},
        ]
        yield {"messages": messages, "audios": [str(rng.choice(paths[language]))], "task": "language"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_language_of_announcements_that_were_not_trained_on_is_told(tmp_path: Path) -> None:
    found = {language: recordings(tmp_path, language) for language in LANGUAGES}
    parts: dict[str, dict[str, list[Path]]] = {"train": {}, "test": {}}
    for language, paths in found.items():
        random.Random(language).shuffle(paths)
        border = len(paths) * 4 // 5
        parts["train"][language], parts["test"][language] = paths[:border], paths[border:]
    for name, count in {"train": 12_000, "test": 300}.items():
        rows = conversations(parts[name], count, random.Random(name))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer(tmp_path / "train.jsonl", tmp_path / "tokenizer", "<audio>")
    main(
        [
            str(Path(spoken_digits.__file__).with_name("spoken_digits.yaml")),
            f"--data.train_path={tmp_path}/train.jsonl",
            f"--data.eval_path={tmp_path}/test.jsonl",
            f"--model.tokenizer_path={tmp_path}/tokenizer",
            f"--train.output_dir={tmp_path}/run",
            "--data.train_size=200000",
        ]
    )
    scores = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert scores["language_accuracy"] >= 0.8  # chance is 0.25
