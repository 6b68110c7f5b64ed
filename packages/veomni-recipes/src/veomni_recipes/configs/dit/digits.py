"""Write scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, as pictures with their names, to be drawn by name.

    python digits.py [FOLDER]        # default data/digits_dit; done once, a folder that is whole is left as it is

FOLDER gets `images/*.png`, `train.jsonl` and `test.jsonl` (80 and 20 % of the digits), lines such as
{"image": "images/0000.png", "prompt": "seven"}, and `prompts.jsonl`, 20 wishes for each digit.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

from veomni_recipes.configs.multimodal.omni.digits import NAMES


def main(folder: Path) -> None:
    """Make the folder, unless it is there: it appears under its name only when it is whole."""
    if folder.is_dir():
        print(f"{folder} is there already")
        return
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    order = random.Random(0).sample(range(len(digits.target)), len(digits.target))
    parts = {"train": order[: int(0.8 * len(order))], "test": order[int(0.8 * len(order)) :]}
    for name, members in parts.items():
        lines = []
        for number in sorted(members):
            path = f"images/{number:04}.png"
            Image.fromarray((digits.images[number] * (255 / 16)).round().astype("uint8")).save(partial / path)
            lines.append(json.dumps({"image": path, "prompt": NAMES[digits.target[number]]}) + "\n")
        (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    wishes = "".join(json.dumps({"prompt": NAMES[i % 10]}) + "\n" for i in range(200))
    (partial / "prompts.jsonl").write_text(wishes, encoding="utf-8")
    partial.rename(folder)
    print(f"wrote {folder}: " + ", ".join(f"{len(v)} pictures for {k}" for k, v in parts.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/digits_dit"))
