"""Write the 2.5 MB of English in Debian's `fortunes` as texts to learn from, and as preferences about them.

    python fortunes.py [FOLDER]             # default data/fortunes; a folder that is whole is left as it is

The entries are taken from where the package installs them, or else the packages `fortunes` and `fortunes-min` are
fetched by `apt-get download` and opened, not installed. An entry that says the same as another one but for case, space
and punctuation is left out, so that nothing that is held out was learnt: 90 % train, 5 % validation, 5 % test.

FOLDER gets `train.jsonl`, `validation.jsonl`, `test.jsonl` (lines of `{"text": ...}`), `tokenizer/` (byte-level BPE of
the training texts, whose start-of-text token stands before each), and `preferences/` with the same three files: of a
`prompt`, the first part of an entry, `chosen` is how it goes on and `rejected` the same words in another order.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INSTALLED = Path("/usr/share/games/fortunes")
VOCABULARY = 1536
SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}


def main(folder: Path) -> None:
    """Make the folder, unless it is there: it appears under its name only when it is whole."""
    if folder.is_dir():
        print(f"{folder} is there already")
        return
    texts = list(entries())
    random.Random(0).shuffle(texts)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "preferences").mkdir(parents=True)
    start, parts = 0, {}
    for name, share in SHARES.items():
        end = start + round(share * len(texts))
        parts[name], start = texts[start:end], end
        _write(partial / f"{name}.jsonl", [{"text": text} for text in parts[name]])
        rng = random.Random(name)
        pairs = [pair for text in parts[name] if (pair := preference(text, rng))]
        _write(partial / "preferences" / f"{name}.jsonl", pairs)
    train_tokenizer(parts["train"], VOCABULARY).save_pretrained(partial / "tokenizer")
    partial.rename(folder)
    sizes = [f"{len(part):,} ({sum(len(t.encode()) for t in part):,} bytes) for {name}" for name, part in parts.items()]
    print(f"wrote {folder}: " + ", ".join(sizes))


def entries() -> Iterator[str]:
    """The entries of all files, each once, in the order of the files' names."""
    seen = set()
    for _, text in sorted(_files().items()):
        for entry in re.split(r"^%.*\n", text, flags=re.MULTILINE):
            entry = entry.strip("\n")
            same = re.sub(r"\W+", "", entry).casefold()
            if same and same not in seen:
                seen.add(same)
                yield entry


def _files() -> dict[str, str]:
    if INSTALLED.is_dir():
        return _read(INSTALLED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            fetch = ["apt-get", "download", "fortunes", "fortunes-min"]
            subprocess.run(fetch, cwd=folder, check=True, capture_output=True, text=True)
            for package in folder.glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, folder], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
            sys.exit(f"the package fortunes is neither installed nor can apt-get fetch it ({reason}): install it")
        return _read(folder / INSTALLED.relative_to("/"))


def _read(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if not path.suffix and path.is_file() and not path.is_symlink()]
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in files}


def preference(text: str, rng: random.Random) -> dict[str, str] | None:
    """A pair about an entry of 12 to 120 words; None for others."""
    words = text.split()
    if not 12 <= len(words) <= 120:
        return None
    half = len(words) // 2
    chosen = words[half:]
    rejected = chosen.copy()
    while rejected == chosen:
        if len(set(chosen)) == 1:
            return None
        rng.shuffle(rejected)
    return {"prompt": " ".join(words[:half]), "chosen": " ".join(chosen), "rejected": " ".join(rejected)}


def train_tokenizer(texts: list[str], size: int) -> Any:
    """A byte-level BPE tokenizer of some texts, with a token before each and the tokens of ChatML."""
    from tokenizers import processors
    from veomni_recipes.smoke import tiny_tokenizer

    tokenizer = tiny_tokenizer(texts, size)
    start = "<|endoftext|>"
    tokenizer.bos_token = start
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
    )
    return tokenizer


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/fortunes"))
