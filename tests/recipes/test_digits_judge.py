"""The judge of drawn digits takes real ones for what they are, and tells copies from drawings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from veomni_recipes.configs.multimodal.omni.digits import NAMES
from veomni_recipes.configs.multimodal.omni.digits_judge import main


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Any, Any]:
    """A folder as `digits_draw.py` writes it, of fewer pictures."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for name, rows in (("train", range(1000)), ("test", range(1000, 1200))):
        lines = []
        for row in rows:
            write(folder / "images" / f"{row}.png", pixels[row])
            messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": NAMES[digits[row]]}]
            lines.append(json.dumps({"messages": messages, "images": [f"images/{row}.png"], "task": "read"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder, pixels, digits


def write(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray((pixels.reshape(8, 8) * 15.9).astype(np.uint8)).save(path)


def judged(folder: Path, pixels: Any, truth: list[int], data: Path) -> dict[str, Any]:
    folder.mkdir()
    lines = []
    for index, (picture, digit) in enumerate(zip(pixels, truth, strict=True)):
        write(folder / f"{index}.png", picture)
        row = {"task": "draw", "wanted": 1, "truth": f"{NAMES[digit]}:", "drawings": [f"{index}.png"]}
        lines.append(json.dumps(row))
    lines += [json.dumps({"task": "read", "wanted": 0, "truth": "one", "drawings": []})]
    lines += [json.dumps({"task": "draw", "wanted": 1, "truth": "one:", "drawings": []})]
    (folder / "predictions.jsonl").write_text("\n".join(lines))
    return main(folder, data)


def test_real_pictures_copies_and_wrong_digits_are_told_apart(data: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, pixels, digits = data
    new, truth = pixels[1200:1300], [int(d) for d in digits[1200:1300]]
    good = judged(tmp_path / "good", new, truth, folder)
    assert good["classifier_accuracy"] > 0.95
    assert good["draw_recognised"] > 0.93, "of 101, one of which was not drawn"
    assert good["variety_drawn"] == pytest.approx(good["variety_real"], rel=0.4)
    assert good["nearest_drawn"] == pytest.approx(good["nearest_real"], rel=0.3)
    wrong = judged(tmp_path / "wrong", new, [(d + 1) % 10 for d in truth], folder)
    assert wrong["draw_recognised"] < 0.05
    copies = judged(tmp_path / "copies", np.tile(pixels[:10], (10, 1)), [int(d) for d in digits[:10]] * 10, folder)
    assert copies["draw_recognised"] > 0.98
    assert copies["nearest_drawn"] < 0.01
    assert copies["variety_drawn"] < 0.01
    assert json.loads((tmp_path / "copies" / "judgement.json").read_text()) == copies
