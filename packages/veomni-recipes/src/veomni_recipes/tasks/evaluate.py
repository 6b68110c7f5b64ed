"""Measure a trained model on held-out data: right answers of conversations, or bits per byte of plain text.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.evaluate evaluate.yaml --evaluate.model_path outputs/sft/hf_ckpt

Writes `scores.json` and `predictions.jsonl`, the same on any number of ranks: batches are made first and dealt then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from veomni_config import ConfigError, EvaluateConfig, EvaluateRecipeConfig, parse_args
from veomni_data import DataError, build_dataset, get_chat_template, multimodal_prompt
from veomni_models import ModelError, use_log_probs

from veomni_recipes.distributed import gather, init_distributed, rank, world_size
from veomni_recipes.evaluation import (
    accuracies,
    answers_to,
    load_exported,
    longest_answer,
    prompt_options,
    tokenizer_of,
)
from veomni_recipes.launch import ends_with_one_sentence
from veomni_recipes.run_folder import write_json, write_json_lines
from veomni_recipes.text_scores import lines_of, score_texts, summarize_texts, texts_of

Config = EvaluateRecipeConfig


@ends_with_one_sentence(ConfigError, DataError, ModelError)
def main(argv: list[str] | None = None) -> None:
    """Measure, and write the scores."""
    cfg = parse_args(Config, argv).evaluate
    init_distributed()
    model, processor = load_exported(Path(cfg.model_path), cfg.tokenizer_path)
    measure = measure_texts if cfg.data_type == "plaintext" else measure_answers
    lines, scores = measure(cfg, model, processor)
    if rank() == 0:
        folder = Path(cfg.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json_lines(folder / "predictions.jsonl", lines)
        write_json(folder / "scores.json", scores)
        print(
            "\n".join(
                f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.4f}"
                for name, value in scores.items()
            )
        )
        print(f"wrote {folder}/scores.json and predictions.jsonl")


def measure_texts(cfg: EvaluateConfig, model: Any, processor: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The score of each text, and of all."""
    rows = build_dataset(cfg.data_path, transform=None, root=cfg.root)
    texts = [(number, text) for number in range(len(rows)) for text in texts_of(rows[number], cfg.text_keys)]
    if not texts:
        raise DataError(f"{cfg.data_path} holds no text")
    use_log_probs(model)
    tokenizer = tokenizer_of(processor)
    own = [
        score_texts(model, tokenizer, part, length=cfg.max_seq_len, batch_size=cfg.batch_size)
        for part in own_batches(texts, cfg.batch_size)
    ]
    scores = in_order(own)
    return lines_of(scores), summarize_texts(scores)


def measure_answers(cfg: EvaluateConfig, model: Any, processor: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The answer to each question, and the share of right ones, of each task and of all."""
    prompt = partial(
        multimodal_prompt,
        template=get_chat_template(cfg.chat_template, tokenizer_of(processor)),
        text_keys=cfg.text_keys or "messages",
        columns=cfg.columns or None,
        **prompt_options(processor),
    )
    rows = build_dataset(cfg.data_path, transform=prompt, root=cfg.root)
    longest = cfg.max_tokens or max(
        gather(longest_answer(processor, [rows[i] for i in range(rank(), len(rows), world_size())]))
    )
    drawings = Path(cfg.output_dir) / "drawings"
    own = [
        answers_to(model, processor, {row: rows[row] for row in part}, drawings, longest)
        for part in own_batches(range(len(rows)), cfg.batch_size)
    ]
    answers = in_order(own)
    lines = [{**asdict(answer), "right": answer.right} for answer in answers]
    return lines, {**accuracies(answers), "questions": len(answers)}


def own_batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Every `world_size()`-th batch, from this rank's number on."""
    starts = range(0, len(items), size)[rank() :: world_size()]
    return [items[start : start + size] for start in starts]


def in_order(own: Sequence[Sequence[Any]]) -> list[Any]:
    """The results of all ranks' batches, as one rank would have made them; every rank calls it."""
    ranks = gather(own)
    count = sum(map(len, ranks))
    return [*chain(*(ranks[i % len(ranks)][i // len(ranks)] for i in range(count)))]


if __name__ == "__main__":
    main()
