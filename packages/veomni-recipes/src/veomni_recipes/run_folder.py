"""The folder of a run: its metrics, and what happens when there is one already."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from veomni_config import ConfigError, Problem

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"


def open_run_folder(folder: Path, *, resume: bool) -> None:
    """Make the folder of a run; unless resuming, an earlier run in it is moved aside (`name.1`, `name.2`, ...)."""
    try:
        _make(folder, resume)
    except OSError as error:
        text = f"{folder} cannot be made: {error.strerror}; name a folder that can be written"
        raise ConfigError([Problem("train.output_dir", text)]) from error


def _make(folder: Path, resume: bool) -> None:
    if not resume and (folder / METRICS).exists():
        aside = next(p for i in count(1) if not (p := folder.with_name(f"{folder.name}.{i}")).exists())
        folder.rename(aside)
        print(f"{folder} held an earlier run, which is now {aside}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)


class Metrics:
    """`metrics.jsonl`: one JSON object a step. A line that a killed run left after the resumed step is dropped."""

    def __init__(self, folder: Path, step: int, name: str = METRICS) -> None:
        """Keep what was written up to `step`, and go on behind it.

        Args:
            name: of the file; `validation.jsonl` has a line for each step that was validated.
        """
        path = folder / name
        write_json_lines(path, (_finite(line) for line in read_metrics(folder, name) if line["step"] <= step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; it is out of this process when this returns. What is not finite, which JSON has not, is null."""
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        self._file.flush()


def read_metrics(folder: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The lines of a run so far; a last line that was cut off is left out, what is null was not finite: NaN."""
    path = folder / name
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    parsed = (json.loads(line) for line in lines[:-1] if line)
    return [{key: math.nan if value is None else value for key, value in line.items()} for line in parsed]


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with None for each number that is not finite."""
    return {
        key: _finite(value)
        if isinstance(value, Mapping)
        else (None if isinstance(value, float) and not math.isfinite(value) else value)
        for key, value in values.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file that is there whole or not at all."""
    _write(path, json.dumps(values, indent=2) + "\n")


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """A file of JSON objects, one a line, that is there whole or not at all."""
    _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def say_goodbye(
    folder: Path, summary: Mapping[str, Any], question: str | None = None, modalities: Sequence[str] = ()
) -> None:
    """The last lines of a run: how good it became, how long it took, where to look and what to try.

    Args:
        question, modalities: what a model that reads pictures, videos or sounds may be asked, and which of these.
    """
    scores = {k.removesuffix("_accuracy"): v for k, v in summary.items() if k.endswith("_accuracy")}
    if scores:
        print(
            "right answers on held-out data: " + ", ".join(f"{v:.1%} {k.replace('_', ' ')}" for k, v in scores.items())
        )
    print(
        f"{summary['seconds']:.0f} s in all: {summary['startup_seconds']:.0f} s to start, "
        f"{summary['training_seconds']:.0f} s to train, at {summary['tokens_per_second']:,.0f} tokens/s"
    )
    print("pictures: " + ", ".join(str(path) for path in sorted(folder.glob("*.png"))))
    if (folder / "hf_ckpt").is_dir():
        print(f"model: {folder / 'hf_ckpt'}")
        command = "hatch run ask" if "HATCH_ENV_ACTIVE" in os.environ else "veomni ask"
        question = question or "What is this?"
        if modalities:
            kind = {"image": "picture", "video": "video", "audio": "sound"}[modalities[0]]
            print(
                f'ask it about a {kind} of your own: {command} {kind.upper()} "{question}" --run {folder}', flush=True
            )
        elif (folder / "hf_ckpt" / "tokenizer_config.json").is_file():
            print(f"talk with it: {command} --run {folder}", flush=True)
