"""Write scikit-learn's 1,797 handwritten digits as conversations about pictures, in the format that users bring.

    python digits.py [FOLDER]        # default data/digits; done once, a folder that is whole is left as it is

FOLDER gets `images/*.png`, `train.jsonl`, `validation.jsonl`, `test.jsonl` and `tokenizer/`. A line of the files is
`{"messages": [...], "images": [paths], "task": "single_picture" | "list" | "sum"}`. Pictures are split before they are
combined, so that nobody is asked about a picture seen in training: 70 % train, 10 % validation, 20 % test. Training
pictures stand there with some copies that are turned, stretched and shifted a little; the others as they are.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SUMS = [*NAMES, *["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"]]
QUESTIONS = {
    "single_picture": ["Which digit is this?", "What number do you see?", "Read the picture."],
    "list": ["Which digits are these?", "What numbers do you see?", "Read the pictures from left to right."],
    "sum": ["What is their sum?", "Add the two digits.", "How much do they make together?"],
}
TRAINING_SAMPLES = 40_000
COPIES = 7  # of each training picture


def main(folder: Path) -> None:
    """Make the folder, unless it is there: it appears under its name only when it is whole."""
    if folder.is_dir():
        print(f"{folder} is there already")
        return
    from sklearn.datasets import load_digits

    digits = load_digits()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    order = random.Random(0).sample(range(len(digits.target)), len(digits.target))
    first, second = int(0.7 * len(order)), int(0.8 * len(order))
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    for name, members in parts.items():
        rng = random.Random(name)
        if name == "train":
            files = {m: write_pictures(partial, m, digits.images[m], rng, copies=COPIES) for m in members}
            samples = training(files, digits.target, rng)
        else:
            files = {m: write_pictures(partial, m, digits.images[m], rng) for m in members}
            samples = held_out(files, digits.target, rng)
        lines = [json.dumps(sample) + "\n" for sample in samples]
        (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(partial / "train.jsonl", partial / "tokenizer")
    partial.rename(folder)
    print(f"wrote {folder}: " + ", ".join(f"{len(v)} pictures for {k}" for k, v in parts.items()))


def write_pictures(folder: Path, number: int, pixels: Any, rng: random.Random, copies: int = 0) -> list[str]:
    """A picture of 8 x 8 pixels in 17 grey levels and some distorted copies as PNG files: their paths."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    names = [f"images/{number:04d}.png", *(f"images/{number:04d}_{i}.png" for i in range(1, copies + 1))]
    picture.save(folder / names[0])
    for name in names[1:]:
        distort(picture, rng).save(folder / name)
    return names


def distort(picture: Image, rng: random.Random) -> Image:
    """Turned by up to 12 degrees, stretched by up to 10 % and shifted by up to 0.6 pixels, about its middle."""
    from PIL import Image

    angle, scale = math.radians(rng.uniform(-12, 12)), rng.uniform(0.9, 1.1)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = (picture.width - 1) / 2, (picture.height - 1) / 2
    right, down = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6)
    inverse = (cos, sin, x - cos * x - sin * y + right, -sin, cos, y + sin * x - cos * y + down)
    return picture.transform(picture.size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)


def training(files: dict[int, list[str]], labels: Any, rng: random.Random) -> Iterator[dict[str, Any]]:
    """40 % single pictures, 30 % lists of two to four, 30 % sums of two; every picture is used equally often."""
    deck: list[int] = []
    for _ in range(TRAINING_SAMPLES):
        (task,) = rng.choices(list(QUESTIONS), [4, 3, 3])
        count = {"single_picture": 1, "list": rng.choice([2, 3, 4]), "sum": 2}[task]
        while len(deck) < count:
            deck += rng.sample(list(files), len(files))
        yield conversation(task, rng.choice(QUESTIONS[task]), [deck.pop(0) for _ in range(count)], files, labels, rng)


def held_out(files: dict[int, list[str]], labels: Any, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Every picture once alone; then lists and sums, as many of each as half of the pictures."""
    members = list(files)
    for i, member in enumerate(members):
        yield conversation("single_picture", QUESTIONS["single_picture"][i % 3], [member], files, labels, rng)
    for i in range(len(members) // 2):
        yield conversation("list", QUESTIONS["list"][i % 3], rng.sample(members, 2 + i % 3), files, labels, rng)
        yield conversation("sum", QUESTIONS["sum"][i % 3], rng.sample(members, 2), files, labels, rng)


def conversation(
    task: str, question: str, members: list[int], files: dict[int, list[str]], labels: Any, rng: random.Random
) -> dict[str, Any]:
    """One question about some pictures with its answer in words; a sum is answered in steps."""
    values = [int(labels[m]) for m in members]
    words = [NAMES[v] for v in values]
    answer = f"{' plus '.join(words)} is {SUMS[sum(values)]}" if task == "sum" else ", ".join(words)
    return {
        "messages": [
            {"role": "user", "content": "<image>" * len(members) + question},
            {"role": "assistant", "content": answer},
        ],
        "images": [rng.choice(files[m]) for m in members],
        "task": task,
    }


def train_tokenizer(data: Path, folder: Path, placeholder: str = "<image>") -> None:
    """A byte-level BPE tokenizer trained on the conversations, saved like any other, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from veomni_data import TEMPLATES

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", placeholder]
    with data.open(encoding="utf-8") as lines:
        texts = [
            f"{m['role']}\n{m['content'].replace(placeholder, '')}" for x in lines for m in json.loads(x)["messages"]
        ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=TEMPLATES["chatml"],
    )
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/digits"))
