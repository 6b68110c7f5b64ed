"""Judge the digits that a run has drawn by a classifier of real ones.

    python digits_judge.py RUN DATA          # outputs/digits_dit data/digits_dit

A support vector machine learns from DATA's `train.jsonl`, with copies that are turned, stretched and shifted a little,
and is tried on its `test.jsonl`; then it reads the drawings in RUN's `predictions.jsonl`. Beside the share that it
takes for the digit asked for stand how much the drawings of a digit differ from each other, and how far they are from
the nearest picture that was learnt from: small numbers there would mean one picture again and again, or copies.
`RUN/judgement.json` gets all of it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from veomni_recipes.configs.multimodal.omni.digits import NAMES, distort
from veomni_recipes.configs.multimodal.omni.digits_judge import nearest, variety

COPIES = 7  # of each picture that the classifier learns from


def main(run: Path, data: Path) -> dict[str, float]:
    """Judge a run, write the judgement into its folder and return it."""
    from sklearn.svm import SVC

    known, digits = read_pictures(data / "train.jsonl", "image")
    copies, of_copies = read_pictures(data / "train.jsonl", "image", COPIES)
    held_out, truth = read_pictures(data / "test.jsonl", "image")
    drawn, asked = read_pictures(run / "predictions.jsonl", "drawing")
    classifier = SVC(C=3.0, gamma=0.5).fit(np.concatenate([known, copies]), np.concatenate([digits, of_copies]))
    judgement = {
        "classifier_accuracy": float(classifier.score(held_out, truth)),
        "recognised": float(classifier.score(drawn, asked)),
        "variety_drawn": variety({digit: list(drawn[asked == digit]) for digit in set(asked.tolist())}),
        "variety_real": variety({digit: list(known[digits == digit]) for digit in set(digits.tolist())}),
        "nearest_drawn": nearest(drawn, known),
        "nearest_real": nearest(held_out, known),
    }
    (run / "judgement.json").write_text(json.dumps(judgement, indent=2) + "\n", encoding="utf-8")
    return judgement


def read_pictures(path: Path, key: str, copies: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The pictures [N, pixels] in 0..1 that lines name, and the digits [N] that their prompts ask for.

    With `copies`, so many distorted ones of each picture in its place.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rng, pictures, digits = random.Random(0), [], []
    for line in lines:
        with Image.open(path.parent / line[key]) as picture:
            grey = picture.convert("L")
        own = [distort(grey, rng) for _ in range(copies)] or [grey]
        pictures += [np.asarray(each, dtype=np.float64).ravel() / 255 for each in own]
        digits += [NAMES.index(line["prompt"])] * len(own)
    return np.stack(pictures), np.array(digits)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(str(__doc__))
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2])), indent=2))
