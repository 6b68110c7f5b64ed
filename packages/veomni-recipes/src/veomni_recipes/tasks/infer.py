"""Let a trained model answer: text, pictures, videos and sounds in; text and drawings out.

    python -m veomni_recipes.tasks.infer infer.yaml --infer.prompt "Why is the sky blue?"
    python -m veomni_recipes.tasks.infer infer.yaml --infer.prompts_path prompts.jsonl --infer.output_path answers.jsonl
    python -m veomni_recipes.tasks.infer infer.yaml                      # a conversation in the terminal

The model is a folder that a run exported (`hf_ckpt`), or any of transformers or diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from veomni_config import ConfigError, InferConfig, InferRecipeConfig, Problem, parse_args
from veomni_data import DataError, build_dataset
from veomni_models import ModelError

from veomni_recipes.chat import Speaker, question, talk
from veomni_recipes.evaluation import load_exported, save_pictures
from veomni_recipes.launch import ends_with_one_sentence
from veomni_recipes.run_folder import write_json_lines

Config = InferRecipeConfig


@ends_with_one_sentence(ConfigError, DataError, ModelError)
def main(argv: list[str] | None = None) -> None:
    """Answer, and print or write the answers."""
    infer = parse_args(Config, argv).infer
    folder, drawings = Path(infer.model_path), Path(infer.drawings_path)
    prompts = [*read_prompts(infer)]
    if any(
        (folder / name).exists() for name in ("model_index.json", "transformer", "pytorch_lora_weights.safetensors")
    ):
        write(infer, draw(infer, prompts, drawings))
        return
    model, processor = load_exported(folder, infer.tokenizer_path)
    sampling: dict[str, Any] = {"do_sample": infer.do_sample}
    if infer.do_sample:  # top_k of transformers would cut the distribution without being asked
        sampling |= {"temperature": infer.temperature, "top_p": infer.top_p, "top_k": 0}
    options = {"sampling": sampling, "max_new_tokens": infer.max_tokens, "seed": infer.seed}
    speaker = Speaker(model, processor, infer.chat, options)
    seed_everything(infer.seed)
    if not prompts:
        talk(speaker, drawings)
        return
    write(infer, answer(speaker, prompts, drawings, infer.batch_size))


def read_prompts(infer: InferConfig) -> Iterator[Mapping[str, Any]]:
    """The prompts of the command line or of a file, with `messages` or `prompt`; none for a conversation."""
    if infer.prompt is not None:
        yield {"messages": [question(infer.prompt, infer.files)]} if infer.files else {"prompt": infer.prompt}
    if infer.prompts_path is None:
        return
    path = Path(infer.prompts_path)
    if path.suffix == ".txt":
        if not path.is_file():
            raise ConfigError([Problem("infer.prompts_path", f"{path}: no such file")])
        yield from ({"prompt": line} for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        return
    rows = build_dataset(infer.prompts_path, transform=None)
    for index in range(len(rows)):
        row = rows[index]
        if not {"prompt", "messages", "text", "conversations"} & set(row):
            where = getattr(row, "place", f"{path}:{index + 1}")
            raise DataError(f'{where}: there is no "prompt" and no "messages" but only {sorted(row)}')
        yield row


def answer(
    speaker: Speaker, prompts: list[Mapping[str, Any]], drawings: Path, batch_size: int
) -> Iterator[dict[str, Any]]:
    """What the model says to each prompt: lines of `prompt` (or `messages`), `answer` and `drawings`."""
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        for number, (row, said) in enumerate(zip(rows, speaker.answer(rows), strict=True), start):
            line = {key: row[key] for key in ("prompt", "messages", "text") if key in row} | {
                "answer": said.text.strip()
            }
            if said.pictures:
                line["drawings"] = [*map(str, save_pictures(said.pictures, drawings, f"{number:04d}"))]
            yield line


def draw(infer: InferConfig, prompts: list[Mapping[str, Any]], drawings: Path) -> Iterator[dict[str, Any]]:
    """What a diffusion transformer draws for each prompt."""
    from veomni_recipes.diffusion_sampling import sample

    if not prompts:
        text = "a model that only draws has no conversations: set it, or infer.prompts_path"
        raise ConfigError([Problem("infer.prompt", text)])
    asked = [str(row.get("prompt", row.get("text"))) for row in prompts]
    for number, (prompt, frames) in enumerate(
        zip(asked, sample(infer.model_path, asked, seed=infer.seed), strict=True)
    ):
        drawings.mkdir(parents=True, exist_ok=True)
        first, *others = frames
        file = drawings / f"{number:04d}.{'gif' if others else 'png'}"
        if others:
            first.save(file, save_all=True, append_images=others, loop=0)
        else:
            first.save(file)
        yield {"prompt": prompt, "answer": "", "drawings": [str(file)]}


def write(infer: InferConfig, lines: Iterable[dict[str, Any]]) -> None:
    """Write the answers into the file, or print them; the only answer to a prompt of the command line as it is."""
    if infer.output_path is not None:
        Path(infer.output_path).parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(Path(infer.output_path), lines)
        print(f"wrote {infer.output_path}")
        return
    for line in lines:
        if infer.prompts_path is not None:
            print(json.dumps(line, ensure_ascii=False), flush=True)
            continue
        if line["answer"]:
            print(line["answer"])
        for file in line.get("drawings", ()):
            print(f"drew {file}")


def seed_everything(seed: int) -> None:
    """Seed the sampling."""
    import torch

    torch.manual_seed(seed)


if __name__ == "__main__":
    main()
