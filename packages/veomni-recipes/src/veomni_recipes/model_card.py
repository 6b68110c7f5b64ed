"""The page that goes with an exported model: what it is, how it was trained, and how good it became."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from veomni_config import RecipeConfig, VLRecipeConfig

from veomni_recipes.report import figures
from veomni_recipes.run_folder import VALIDATION, read_json, read_metrics
from veomni_recipes.validation import BEST

_PICTURES = {
    "loss.png": "Loss over steps",
    "predictions.png": "Answers to held-out questions",
    "samples.png": "Drawings of held-out prompts",
}
_DRAWS = {"DiTPipeline": "unconditional-image-generation", "WanPipeline": "text-to-video"}  # the others: text-to-image
_ASKED = {
    "unconditional-image-generation": "pictures of classes",
    "text-to-image": "what a prompt asks for",
    "text-to-video": "videos of what a prompt asks for",
}
_CARD = """{front}
# {name}

{about} Trained by the recipe `{recipe}` of `veomni-recipes`.

## Use

```{use_language}
{use}
```

## Training

{table}

{pictures}
## Configuration

Paths are shortened to their last part.

```yaml
{config}```
"""


def write_card(folder: Path, cfg: RecipeConfig, recipe: str, *, pipeline: str | None = None) -> None:
    """Write `README.md`, with its pictures beside it, into the `hf_ckpt/` of a run, if that has one.

    Its metadata are those of a Hugging Face model card: task, library, base model and data if they are of the hub, and
    the figures of validations and of the evaluation.

    Args:
        folder: of the run, whose metrics, summary and pictures are there.
        cfg: of the run.
        recipe: its name.
        pipeline: of a transformer of diffusers, the class that draws with it.
    """
    exported = folder / "hf_ckpt"
    if not exported.is_dir():
        return
    summary = read_json(folder / "summary.json")
    lines, validations = read_metrics(folder), read_metrics(folder, VALIDATION)
    shown = []
    for file, title in _PICTURES.items():
        if (folder / file).is_file():
            shutil.copyfile(folder / file, exported / file)
            shown.append(f"![{title}]({file})\n")
    table = ["| | |", "| --- | --- |"]
    numbers = figures(lines, summary, validations)
    if best := read_json(folder / BEST):
        named = ", ".join(f"{key} {value:.4g}" for key, value in best.items() if key != "step")
        chosen = ", which is exported" if cfg.train.export_checkpoint == "best" else ""
        numbers["best checkpoint"] = f"step {best['step']:,} ({named}){chosen}"
    numbers["data"] = _short(cfg.data.train_path)
    table += [f"| {name} | {value} |" for name, value in numbers.items()]
    task = _DRAWS.get(pipeline, "text-to-image") if pipeline else _task(cfg)
    name = folder.resolve().name
    content = _CARD.format(
        front="---\n" + _metadata(cfg, folder, task, summary, validations).to_yaml() + "\n---\n",
        name=name,
        about=_about(cfg, summary, task),
        recipe=recipe,
        use_language="python" if pipeline or task == "text-generation" else "bash",
        use=_use(cfg, task, pipeline),
        table="\n".join(table),
        pictures="\n".join(shown),
        config=yaml.safe_dump(_shortened(cfg.model_dump(mode="json", exclude_defaults=True)), sort_keys=False),
    )
    ModelCard(content).save(exported / "README.md")


_USE_TEXT = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""
_USE_MEDIA = 'veomni ask picture.png "What is this?" --run path/to/this/folder'
_USE_CLASSES = """from veomni_recipes.diffusion_sampling import sample

(frames,) = sample("path/to/this/folder", ["{label}"])
frames[0].save("drawing.png")"""
_USE_PIPELINE = """from diffusers import {pipeline}
{video}
pipeline = {pipeline}.from_pretrained("{folder}")
{adapters}drawn = pipeline({asked})
{save}"""


def _use(cfg: RecipeConfig, task: str, pipeline: str | None) -> str:
    """How the model is asked."""
    if pipeline is None:
        return _USE_TEXT if task == "text-generation" else _USE_MEDIA
    labels, here = getattr(cfg.model, "labels", ()), "path/to/this/folder"
    if cfg.model.model_path is None:  # its latents are pixels, and diffusers' pipeline has a VAE
        return _USE_CLASSES.format(label=labels[0] if labels else "")
    lora = cfg.train.train_architecture == "lora"
    save = 'drawn.images[0].save("drawing.png")'
    if task == "text-to-video":
        save = 'export_to_video(drawn.frames[0], "drawing.mp4")'
    return _USE_PIPELINE.format(
        pipeline=pipeline,
        folder=_short(str(cfg.model.model_path)) if lora else here,
        adapters=f'pipeline.load_lora_weights("{here}")\n' if lora else "",
        asked="[0]" if pipeline == "DiTPipeline" else '"a red flower"',
        video="from diffusers.utils import export_to_video\n" if task == "text-to-video" else "",
        save=save,
    )


def _task(cfg: RecipeConfig) -> str:
    """The hub's name for what the model does."""
    if cfg.model.decoders:
        return "any-to-any"
    kinds = {"image": "image-text-to-text", "video": "video-text-to-text", "audio": "audio-text-to-text"}
    return next((task for kind, task in kinds.items() if kind in _reads(cfg)), "text-generation")


def _reads(cfg: RecipeConfig) -> list[str]:
    """What the model reads besides text, as far as the configuration says."""
    return ["image"] if isinstance(cfg, VLRecipeConfig) else [*cfg.model.encoders]


def _about(cfg: RecipeConfig, summary: Mapping[str, Any], task: str) -> str:
    size = f"A model of {summary['parameters']:,} parameters" if "parameters" in summary else "A model"
    if task in _ASKED:
        adapters = cfg.train.train_architecture == "lora" and "trained_parameters" in summary
        learnt = f", of which {summary['trained_parameters']:,} in adapters were trained," if adapters else ""
        return f"{size}{learnt} that draws {_ASKED[task]}."
    reads = ", ".join(f"{kind}s" for kind in _reads(cfg))
    does = f" that reads {reads}" if reads else ""
    draws = (" and draws" if reads else " that draws") if cfg.model.decoders else ""
    return f"{size}{does}{draws}."


def _metadata(
    cfg: RecipeConfig, folder: Path, task: str, summary: Mapping[str, Any], validations: list[dict[str, Any]]
) -> ModelCardData:
    data: dict[str, Any] = {"task_type": task, "dataset_name": "held-out data"}
    data["dataset_type"] = _short(cfg.data.eval_path or "")
    results = [
        EvalResult(metric_type="accuracy", metric_name=key.replace("_", " "), metric_value=round(value, 6), **data)
        for key, value in summary.items()
        if key.endswith("_accuracy")
    ]
    best = read_json(folder / BEST).get("step") if cfg.train.export_checkpoint == "best" else None
    told = [line for line in validations if best in (None, line["step"])]
    if told:
        loss = round(told[-1]["loss"], 6)
        results.append(EvalResult(metric_type="loss", metric_name="validation loss", metric_value=loss, **data))
    base = cfg.model.model_path
    adapters = cfg.train.train_architecture == "lora"
    return ModelCardData(
        library_name="diffusers" if task in _ASKED else "transformers",
        pipeline_tag=task,
        tags=["veomni", *(["lora"] if adapters else []), *(["class-conditional"] if task.startswith("uncond") else [])],
        base_model=str(base) if base is not None and _of_the_hub(str(base)) else None,
        datasets=[cfg.data.train_path] if _of_the_hub(cfg.data.train_path) else None,
        model_name=folder.resolve().name if results else None,
        eval_results=results or None,
    )


def _of_the_hub(path: str) -> bool:
    """Whether this is an id such as `Qwen/Qwen3-8B`, not a file or folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def _short(path: str) -> str:
    return Path(path).name if path.startswith(("/", "~")) else path


def _shortened(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _shortened(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_shortened(value) for value in values]
    return _short(values) if isinstance(values, str) else values
