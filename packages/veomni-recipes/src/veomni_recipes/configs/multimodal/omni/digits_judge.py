"""Judge the digits that a run has drawn by a classifier of real ones.

    python digits_judge.py RUN DATA          # outputs/digits_draw data/digits_draw

A support vector machine learns from the pictures of DATA's `train.jsonl` and is tried on those of its `test.jsonl`;
then it reads what RUN drew on request. Beside the share that it takes for the digit asked for stand how much the
drawings of a digit differ from each other, and how far they are from the nearest picture that was learnt from: small
numbers there would mean one picture again and again, or copies. `RUN/judgement.json` gets all of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from veomni_recipes.configs.multimodal.omni.digits import NAMES


def main(run: Path, data: Path) -> dict[str, Any]:
    """Judge a run, write the judgement into its folder and return it."""
    from sklearn.svm import SVC

    known, digits = read_pictures(data, "train.jsonl")
    held_out, truth = read_pictures(data, "test.jsonl")
    classifier = SVC(C=3.0, gamma=0.5 if known.shape[1] == 64 else "scale").fit(known, digits)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    judgement: dict[str, Any] = {"classifier_accuracy": float(classifier.score(held_out, truth))}
    drawn: dict[int, list[np.ndarray]] = {}
    for task in dict.fromkeys(row["task"] for row in rows if row["wanted"]):
        hits = []
        for row in (row for row in rows if row["task"] == task):
            digit = NAMES.index(row["truth"].rstrip(": "))
            pictures = [grey(run / name, known.shape[1]) for name in row["drawings"][:1]]
            hits += [bool(pictures) and classifier.predict(pictures)[0] == digit]
            drawn.setdefault(digit, []).extend(pictures)
        judgement[f"{task}_recognised"] = float(np.mean(hits))
    everything = np.concatenate([np.stack(own) for own in drawn.values()])
    judgement |= {
        "variety_drawn": variety(drawn),
        "variety_real": variety({d: list(known[digits == d]) for d in set(digits.tolist())}),
        "nearest_drawn": nearest(everything, known),
        "nearest_real": nearest(held_out, known),
    }
    (run / "judgement.json").write_text(json.dumps(judgement, indent=2) + "\n", encoding="utf-8")
    return judgement


def read_pictures(data: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The pictures [N, pixels] in 0..1 that conversations of a file read, each once, and their digits [N]."""
    digits: dict[str, int] = {}
    for line in (data / name).read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        if sample["task"] == "read":
            digits[sample["images"][0]] = NAMES.index(sample["messages"][-1]["content"])
    return np.stack([grey(data / path) for path in digits]), np.array(list(digits.values()))


def grey(path: Path, pixels: int | None = None) -> np.ndarray:
    """A picture's pixels in 0..1, of the size of those that are judged by."""
    with Image.open(path) as picture:
        side = round((pixels or picture.width**2) ** 0.5)
        return np.asarray(picture.convert("L").resize((side, side)), dtype=np.float64).ravel() / 255


def variety(pictures: dict[int, list[np.ndarray]]) -> float:
    """Mean over digits and pixels of the standard deviation among a digit's pictures."""
    return float(np.mean([np.std(np.stack(own), axis=0).mean() for own in pictures.values()]))


def nearest(pictures: np.ndarray, known: np.ndarray) -> float:
    """Mean distance (root of the mean square of pixels) to the nearest known picture."""
    return float(np.mean([np.sqrt(((known - picture) ** 2).mean(1).min()) for picture in pictures]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(str(__doc__))
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2])), indent=2))
