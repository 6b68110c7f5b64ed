"""Answers to held-out questions by real generation, and how many are right."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from veomni_ckpt import export_hf
from veomni_data import Generation
from veomni_models import (
    OmniModel,
    OmniProcessor,
    build_foundation_model,
    build_processor,
    drawing_options,
    is_omni_folder,
    reply,
)

from veomni_recipes.distributed import barrier, gather, rank, world_size

if TYPE_CHECKING:
    from PIL.Image import Image
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
        wanted: how many pictures the data's answer draws.
        drawings: files of the pictures that the model drew, from the run's folder.
    """

    row: int
    task: str
    question: str
    text: str
    truth: str
    wanted: int = 0
    drawings: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Whether the texts agree, but for white space around them, and as many pictures were drawn as in the data."""
        return self.text.strip() == self.truth.strip() and len(self.drawings) == self.wanted


@dataclass(frozen=True)
class Said:
    """What a model answered: `text`, decoded without special tokens, and the `pictures` that it drew."""

    text: str
    pictures: tuple[Image, ...] = ()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    sampling: Mapping[str, Any] = {},
    streamer: Any = None,
    **drawing: Any,
) -> list[Said]:
    """What the model says to each prompt, and the pictures that it draws.

    Args:
        model: any model that generates from its processor's output; not sharded.
        processor: of the model, or for text alone its tokenizer.
        prompts: made by `multimodal_prompt`: `text` that ends where the model is to speak, with the processor's
            placeholder for each of its `images`, `videos` and `audio`.
        max_new_tokens: where an answer is cut.
        batch_size: prompts decoded together, padded on the left.
        sampling: options of transformers' `generate`, such as `{"do_sample": True, "top_p": 0.9}`; without them the
            likeliest token is taken. A model that draws always takes it.
        streamer: of transformers, which shows a single answer while it is made.
        drawing: of `DrawingOptions`, for a model that draws, in place of what its config says.
    """
    answers: list[Said] = []
    tokenizer = tokenizer_of(processor)
    model.eval()
    for start, batch in _batches(prompts, batch_size):
        inputs = processor(
            text=[prompt["text"] for prompt in batch],
            **_media(processor, batch),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
            **({"add_special_tokens": False} if processor is tokenizer else {}),  # those of a prompt stand in it
        ).to(model.device)
        if isinstance(model, OmniModel) and model.config.decoders:
            options = drawing_options(model, **{**drawing, "seed": drawing.get("seed", 0) + start})
            answers += [
                Said(tokenizer.decode(made.token_ids, skip_special_tokens=True), tuple(map(_image, made.pictures)))
                for made in reply(
                    model,
                    dict(inputs),
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                    max_new_tokens=max_new_tokens,
                    unconditional_ids=_nothing_asked(processor),
                    drawing=options,
                )
            ]
            continue
        made = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **{"do_sample": False, **sampling},
        )
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += map(Said, texts)
    return answers


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or itself if it is one."""
    return getattr(processor, "tokenizer", processor)


def _batches(prompts: Sequence[Any], most: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """Where batches begin, and their prompts: processors take one rate of frames for all videos of a call."""
    start = 0
    while start < len(prompts):
        rates: set[float] = set()
        end = start
        while end < min(start + most, len(prompts)):
            rates |= {_sampled_fps(metadata) for metadata in prompts[end].get("video_metadata", ())}
            if len(rates) > 1 and end > start:
                break
            end += 1
        yield start, prompts[start:end]
        start = end


def _sampled_fps(metadata: Mapping[str, Any]) -> float:
    """Frames a second of those that were taken of a video."""
    return len(metadata["frames_indices"]) / metadata["total_num_frames"] * metadata["fps"]


def _nothing_asked(processor: ProcessorMixin) -> torch.Tensor:
    """int64 [S]: an empty message, and an answer that begins with a picture."""
    messages = [{"role": "user", "content": ""}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = processor.tokenizer(text + processor.image_gen_start_token, add_special_tokens=False, return_tensors="pt")
    return ids["input_ids"][0]


def _image(pixels: torch.Tensor) -> Image:
    """[3, S, S] in -1 .. 1 as a picture."""
    from PIL import Image

    return Image.fromarray(((pixels.movedim(0, -1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy())


def pictures_to_draw(processor: OmniProcessor) -> Generation | None:
    """How the pictures of answers become part of a sample; None for a model that does not draw."""
    return Generation(**processor.generation) if processor.generation else None


def _media(processor: ProcessorMixin, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The pictures, videos and sounds of several prompts, as arguments of the processor."""
    keys = ("images", "videos", "video_metadata", "audio")
    media = {key: [item for prompt in prompts for item in prompt.get(key, ())] for key in keys}
    arguments: dict[str, Any] = {key: items for key, items in media.items() if items}
    if "videos" in arguments:
        arguments["do_sample_frames"] = False
        if len(rates := {_sampled_fps(metadata) for metadata in arguments["video_metadata"]}) == 1:
            arguments["fps"] = rates.pop()
    if "audio" in arguments:
        arguments["sampling_rate"] = processor.feature_extractor.sampling_rate
    return arguments


def prompt_options(processor: ProcessorMixin) -> dict[str, Any]:
    """What `multimodal_prompt` has to know of a processor."""
    names = ("image_token", "video_token", "audio_token")
    options: dict[str, Any] = {name: getattr(processor, name, None) for name in names}
    if hasattr(processor, "feature_extractor"):
        options["sampling_rate"] = processor.feature_extractor.sampling_rate
    if isinstance(processor, OmniProcessor):
        options["generation"] = pictures_to_draw(processor)
    return options


def answer_held_out(
    folder: Path, prompts: Sequence[Mapping[str, Any]], rows: Sequence[int], drawings: Path
) -> list[Answer]:
    """What the exported model in `folder` answers to `rows` of held-out prompts (made by `multimodal_prompt`).

    What it draws is written into the folder `drawings` as PNG files.
    """
    model, processor = load_exported(folder)
    chosen = {row: prompts[row] for row in rows}
    return answers_to(model, processor, chosen, drawings, longest_answer(processor, [*chosen.values()]))


def longest_answer(processor: ProcessorMixin, prompts: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of the longest right answer to prompts, and 8: one that goes on beyond is wrong whatever follows."""
    truths = tokenizer_of(processor)([p["answer"] for p in prompts] or [""], add_special_tokens=False)["input_ids"]
    return max(map(len, truths)) + 8


def answers_to(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Mapping[int, Mapping[str, Any]],
    drawings: Path,
    max_new_tokens: int,
) -> list[Answer]:
    """What a model answers to prompts (made by `multimodal_prompt`), given with their rows."""
    answers = []
    first = next(iter(prompts), 0)
    said = generate(model, processor, [*prompts.values()], max_new_tokens=max_new_tokens, seed=first)
    for (row, prompt), each in zip(prompts.items(), said, strict=True):
        files = save_pictures(each.pictures, drawings, f"{row:04d}")
        names = tuple(f"{drawings.name}/{file.name}" for file in files)
        truth, wanted = prompt["answer"], len(prompt.get("targets", ()))
        answers.append(Answer(row, prompt.get("task", "question"), prompt["question"], each.text, truth, wanted, names))
    return answers


def answer_in_training(
    model: torch.nn.Module, processor: ProcessorMixin, prompts: Sequence[Mapping[str, Any]], folder: Path, count: int
) -> dict[str, float]:
    """The accuracies of `count` answers, spread over the prompts, of a model that is still trained.

    Every rank calls it. The model is exported for that into a folder that is deleted afterwards, and loaded by each
    rank, which answers its share.

    Args:
        model: wrapped.
        processor: of the model.
        prompts: made by `multimodal_prompt`.
        folder: to export into, of the run.
        count: of answers; no more than there are prompts.
    """
    export_hf(model, folder, assets=[processor])
    rows = range(0, len(prompts), max(1, len(prompts) // count))[:count]
    own = rows[rank() :: world_size()]
    answers = [*chain(*gather(answer_held_out(folder, prompts, own, folder / "drawings")))]
    if rank() == 0:
        shutil.rmtree(folder)
    barrier()
    return accuracies(answers)


def save_pictures(pictures: Sequence[Image], folder: Path, name: str) -> list[Path]:
    """Write pictures as PNG files `name_1.png`, `name_2.png`, ...; the folder is made if there is any."""
    files = [folder / f"{name}_{i}.png" for i in range(1, len(pictures) + 1)]
    for file, picture in zip(files, pictures, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    return files


def load_exported(folder: Path, processor_path: str | Path | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model, on this process's device, and the processor of a folder that a run exported.

    Of a model of text alone the processor is its tokenizer.

    Args:
        folder: of the model.
        processor_path: folder of the processor; None is the same one.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if is_omni_folder(folder):
        return OmniModel.from_pretrained(folder).to(device).eval(), OmniProcessor.from_pretrained(
            processor_path or folder
        )
    model = build_foundation_model(None, folder, attn_implementation=None, init_device=str(device))
    return model.eval(), build_processor(processor_path or folder)


def accuracies(answers: Sequence[Answer]) -> dict[str, float]:
    """The share of right answers of every task, as `TASK_accuracy`, and of all, as `all_accuracy`."""
    groups = {task: [a.right for a in answers if a.task == task] for task in dict.fromkeys(a.task for a in answers)}
    groups["all"] = [a.right for a in answers]
    return {f"{name}_accuracy": sum(right) / len(right) for name, right in groups.items() if right}
