"""Plain text into packed rows: how much of the tokenizer's own speed is left by everything around it.

The text is the language reference that Python ships, cut into documents of log-normal lengths; the tokenizer is a
byte-level BPE that is trained on it. All ways take turns in one process, and count the same tokens:

- tokenizer: `tokenizer(text)`, one document after the other, which are in memory; nothing else is done;
- tokenizer, 1,000 at once: `tokenizer(texts)`, on one thread too;
- files to batches: a file of JSON lines -> `build_dataset` -> `process_pretrain_example` -> `build_dataloader` ->
  packed batches of tensors, in the same process; and with worker processes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pipeline's workers have one thread each

from pydoc_data.topics import topics

from lengths import medians, report, write
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from veomni_data import build_dataloader, build_dataset, process_pretrain_example

MAX_SEQ_LEN = 8192


def make_tokenizer(vocabulary: int = 8192) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    bpe.train_from_iterator(topics.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


def documents(count: int, seed: int = 0) -> list[str]:
    """Pieces of the text, of some 500 tokens on average."""
    rng = np.random.default_rng(seed)
    text = "\n\n".join(topics.values())
    sizes = np.clip(rng.lognormal(np.log(1800) - 0.5, 1.0, count), 20, 30_000).astype(int)
    return [
        text[begin : begin + size]
        for size, begin in zip(sizes, rng.integers(0, len(text) - 30_000, count), strict=True)
    ]


def tokenize_each(tokenizer: Any, texts: list[str]) -> int:
    """Tokens of all texts, one call each."""
    return sum(len(tokenizer(text)["input_ids"]) for text in texts)


def tokenize_many(tokenizer: Any, texts: list[str]) -> int:
    """Tokens of all texts, 1,000 a call."""
    calls = (tokenizer(texts[i : i + 1000])["input_ids"] for i in range(0, len(texts), 1000))
    return sum(len(ids) for call in calls for ids in call)


def make_batches(path: Path, tokenizer: Any, workers: int) -> int:
    """Tokens of an epoch of batches, but for those of the end of a document."""
    encode = partial(process_pretrain_example, tokenizer=tokenizer, max_seq_len=MAX_SEQ_LEN)
    loader = build_dataloader(
        build_dataset(path, transform=encode),
        dp_rank=0,
        dp_size=1,
        micro_batch_size=1,
        global_batch_size=8,
        max_seq_len=MAX_SEQ_LEN,
        num_workers=workers,
        drop_last=False,
    )
    batches = [batch for step in loader for batch in step]
    real = [batch["input_ids"] for batch in batches if (batch["labels"] >= 0).any()]  # the last step lacks rows
    return sum(ids.numel() - int((ids == tokenizer.eos_token_id).sum()) for ids in real)


def main() -> None:
    """Measure, print the table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer, texts = make_tokenizer(), documents(args.documents)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.jsonl")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        ways = {
            "tokenizer": partial(tokenize_each, tokenizer, texts),
            "tokenizer, 1,000 at once": partial(tokenize_many, tokenizer, texts),
            "files to batches": partial(make_batches, path, tokenizer, 0),
        }
        for workers in args.workers:
            ways[f"files to batches, {workers} workers"] = partial(make_batches, path, tokenizer, workers)
        seconds, tokens = medians(ways, args.repeats)
    if len(set(tokens.values())) > 1:
        raise SystemExit(f"the ways did not make the same tokens: {tokens}")
    alone = tokens["tokenizer"] / seconds["tokenizer"]
    figures = {
        name: {"tokens_per_second": tokens[name] / seconds[name], "of_tokenizer": tokens[name] / seconds[name] / alone}
        for name in ways
    }
    rows = [[n, f"{f['tokens_per_second']:,.0f}", f"{f['of_tokenizer']:.3f}"] for n, f in figures.items()]
    title = f"{len(texts):,} documents, {tokens['tokenizer']:,} tokens"
    report(title, ["", "tokens/s", "of the tokenizer"], rows)
    write(args.json, {"text_pipeline": figures})


if __name__ == "__main__":
    main()
