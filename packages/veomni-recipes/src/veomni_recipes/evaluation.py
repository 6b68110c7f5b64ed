"""Answers to held-out questions by real generation, and how many are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from veomni_models import OmniModel, OmniProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


@dataclass(frozen=True, order=True)
class Answer:
    """A held-out question with what the model said.

    Attributes:
        row: which of the held-out samples it is.
        task: what kind of question, the data's `task` column.
        question: the user's last message without its pictures, videos and sounds.
        text: the model's answer.
        truth: the data's answer.
    """

    row: int
    task: str
    question: str
    text: str
    truth: str

    @property
    def right(self) -> bool:
        """Whether the two agree, but for white space around them."""
        return self.text.strip() == self.truth.strip()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """What the model says to each prompt, decoded greedily, without special tokens.

    Args:
        model: any model that generates from its processor's output; not sharded.
        processor: of the model.
        prompts: made by `multimodal_prompt`: `text` that ends where the model is to speak, with the processor's
            placeholder for each of its `images`, `videos` and `audio`.
        max_new_tokens: where an answer is cut.
        batch_size: prompts decoded together, padded on the left.
    """
    answers: list[str] = []
    tokenizer = processor.tokenizer
    model.eval()
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs = processor(
            text=[prompt["text"] for prompt in batch],
            **_media(processor, batch),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        ).to(model.device)
        made = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _media(processor: ProcessorMixin, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The pictures, videos and sounds of several prompts, as arguments of the processor."""
    keys = ("images", "videos", "video_metadata", "audio")
    media = {key: [item for prompt in prompts for item in prompt.get(key, ())] for key in keys}
    arguments: dict[str, Any] = {key: items for key, items in media.items() if items}
    if "videos" in arguments:
        arguments["do_sample_frames"] = False
    if "audio" in arguments:
        arguments["sampling_rate"] = processor.feature_extractor.sampling_rate
    return arguments


def prompt_options(processor: OmniProcessor) -> dict[str, Any]:
    """What `multimodal_prompt` has to know of a processor."""
    tokens = {f"{kind}_token": getattr(processor, f"{kind}_token") for kind in ("image", "video", "audio")}
    return {**tokens, "sampling_rate": processor.feature_extractor.sampling_rate}


def answer_held_out(folder: Path, prompts: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> list[Answer]:
    """What the exported model in `folder` answers to `rows` of held-out prompts (made by `multimodal_prompt`)."""
    model, processor = load_exported(folder)
    chosen = [prompts[row] for row in rows]
    truths = processor.tokenizer([p["answer"] for p in chosen] or [""], add_special_tokens=False)["input_ids"]
    longest = max(map(len, truths)) + 8  # an answer that goes on beyond is wrong whatever follows
    texts = generate(model, processor, chosen, max_new_tokens=longest)
    return [
        Answer(row, p.get("task", "question"), p["question"], text, p["answer"])
        for row, p, text in zip(rows, chosen, texts, strict=True)
    ]


def load_exported(folder: Path) -> tuple[OmniModel, OmniProcessor]:
    """The model, on this process's device, and the processor of a folder that a run exported."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return OmniModel.from_pretrained(folder).to(device).eval(), OmniProcessor.from_pretrained(folder)


def accuracies(answers: Sequence[Answer]) -> dict[str, float]:
    """The share of right answers of every task, as `TASK_accuracy`, and of all, as `all_accuracy`."""
    groups = {task: [a.right for a in answers if a.task == task] for task in dict.fromkeys(a.task for a in answers)}
    groups["all"] = [a.right for a in answers]
    return {f"{name}_accuracy": sum(right) / len(right) for name, right in groups.items() if right}
