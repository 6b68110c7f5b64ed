"""Short runs of the text recipe, with a model of a few thousand weights and texts of a line."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from veomni_recipes.smoke import tiny_tokenizer
from veomni_recipes.tasks import train_torch

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def texts(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [" ".join(WORDS[(i * n + k) % 10] for k in range(n)) for i, n in enumerate(lengths)]


def prepare(folder: Path, *, train: int = 400, held_out: int = 40) -> list[str]:
    """Write data and a model into the folder; returns the command line of a run in `folder/run`."""
    for name, count in (("train", train), ("held_out", held_out)):
        lines = [json.dumps({"text": text}) for text in texts(count, seed=len(name))]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = tiny_tokenizer(texts(200))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen3", **sizes, **heads, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return [
        f"--model.model_path={folder}/model",
        f"--data.train_path={folder}/train.jsonl",
        "--data.data_type=plaintext",
        "--data.text_keys=text",
        "--data.max_seq_len=64",
        "--data.num_workers=0",
        "--data.train_size=3000",
        f"--train.output_dir={folder}/run",
        "--train.data_parallel_mode=fsdp2",
        "--train.init_device=meta",
        "--train.enable_mixed_precision=false",
        "--train.enable_gradient_checkpointing=false",
        "--train.global_batch_size=4",
        "--train.lr=1e-2",
        "--train.max_steps=8",
        "--train.save_epochs=0",
        "--train.save_hf_weights=false",
    ]


def train(arguments: list[str]) -> None:
    train_torch.main(arguments)
