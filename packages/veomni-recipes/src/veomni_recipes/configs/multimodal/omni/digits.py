"""Write scikit-learn's 1,797 handwritten digits as conversations about pictures, in the format that users bring.

    python digits.py [FOLDER]        # default data/digits; done once, a folder that is whole is left as it is

FOLDER gets `images/*.png`, `train.jsonl`, `validation.jsonl`, `test.jsonl` and `tokenizer/`. A line of the files is
`{"messages": [...], "images": [paths], "task": "single_picture" | "list" | "sum"}`. Pictures are split before they are
combined, so that nobody is asked about a picture seen in training: 70 % train, 10 % validation, 20 % test.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = "zero one two three four five six seven eight nine".split()
SUMS = [*NAMES, *"ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen".split()]
QUESTIONS = {
    "single_picture": ["Which digit is this?", "What number do you see?", "Read the picture."],
    "list": ["Which digits are these?", "What numbers do you see?", "Read the pictures from left to right."],
    "sum": ["What is their sum?", "Add the two digits.", "How much do they make together?"],
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_SAMPLES = 14_000


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
    write_pictures(partial / "images", digits.images)
    order = random.Random(0).sample(range(len(digits.target)), len(digits.target))
    first, second = int(0.7 * len(order)), int(0.8 * len(order))
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    for name, members in parts.items():
        rng = random.Random(name)
        samples = training(members, digits.target, rng) if name == "train" else held_out(members, digits.target, rng)
        lines = [json.dumps(sample) + "\n" for sample in samples]
        (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(partial / "train.jsonl", partial / "tokenizer")
    partial.rename(folder)
    print(f"wrote {folder}: " + ", ".join(f"{len(v)} pictures for {k}" for k, v in parts.items()))


def write_pictures(folder: Path, images: Any) -> None:
    """8 x 8 pictures of 17 grey levels [n, 8, 8] as PNG files."""
    import numpy as np
    from PIL import Image

    for i, image in enumerate(images):
        Image.fromarray((image * (255 / 16)).round().astype(np.uint8)).save(folder / f"{i:04d}.png")


def training(members: list[int], labels: Any, rng: random.Random) -> Iterator[dict[str, Any]]:
    """40 % single pictures, 30 % lists of two to four, 30 % sums of two; every picture is used equally often."""
    deck: list[int] = []
    for _ in range(TRAINING_SAMPLES):
        (task,) = rng.choices(list(QUESTIONS), [4, 3, 3])
        count = {"single_picture": 1, "list": rng.choice([2, 3, 4]), "sum": 2}[task]
        while len(deck) < count:
            deck += rng.sample(members, len(members))
        yield conversation(task, [deck.pop(0) for _ in range(count)], labels, rng)


def held_out(members: list[int], labels: Any, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Every picture once alone; then lists and sums, as many of each as half of the pictures."""
    for member in members:
        yield conversation("single_picture", [member], labels, rng)
    for i in range(len(members) // 2):
        yield conversation("list", rng.sample(members, 2 + i % 3), labels, rng)
        yield conversation("sum", rng.sample(members, 2), labels, rng)


def conversation(task: str, members: list[int], labels: Any, rng: random.Random) -> dict[str, Any]:
    """One question about some pictures with its answer in words; a sum is answered in steps."""
    values = [int(labels[m]) for m in members]
    words = [NAMES[v] for v in values]
    answer = f"{' plus '.join(words)} is {SUMS[sum(values)]}" if task == "sum" else ", ".join(words)
    return {
        "messages": [
            {"role": "user", "content": "<image>" * len(members) + rng.choice(QUESTIONS[task])},
            {"role": "assistant", "content": answer},
        ],
        "images": [f"images/{m:04d}.png" for m in members],
        "task": task,
    }


def train_tokenizer(data: Path, folder: Path) -> None:
    """A byte-level BPE tokenizer trained on the conversations, saved like any other, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    with data.open(encoding="utf-8") as lines:
        texts = [f"{m['role']}\n{m['content'].replace('<image>', '')}" for x in lines for m in json.loads(x)["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/digits"))
