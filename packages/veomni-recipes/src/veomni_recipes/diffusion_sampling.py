"""Pictures and videos that a diffusion transformer draws, while it is trained and afterwards."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from veomni_recipes.diffusion import is_flow, shift_exponent
from veomni_recipes.diffusion_data import conditions_of
from veomni_recipes.diffusion_pipeline import decode_latents, latent_shape, load_encoders
from veomni_recipes.diffusion_transformers import count_latent_tokens, family_of
from veomni_recipes.distributed import gather, rank
from veomni_recipes.run_folder import write_json_lines

if TYPE_CHECKING:
    from PIL.Image import Image
    from veomni_config import DitRecipeConfig
    from veomni_data import Sample
    from veomni_parallel import ParallelState

Predict = Callable[[Tensor, Tensor, Mapping[str, Tensor], float], Tensor]


@torch.no_grad()
def sample_latents(
    predict: Predict,
    config: Mapping[str, Any],
    scheduler: Any,
    noise: Tensor,
    conditions: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor],
    *,
    steps: int,
    guidance_scale: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents from noise, by the scheduler's own steps: what the family's pipeline draws of the same noise.

    Args:
        predict: `Family.predict` with its model and config.
        config: the transformer's.
        noise: [B, ...] of variance 1.
        conditions: [B, ...] each.
        unconditional: of no prompt, [...] each.
        steps: of denoising.
        guidance_scale: s in prediction = unconditional + s (conditional - unconditional), see
            https://arxiv.org/abs/2207.12598; a guidance-distilled transformer is told s instead.
        generator: of schedulers that add noise on their way.
    """
    scheduler = copy.deepcopy(scheduler)
    options: dict[str, Any] = {}
    tokens = count_latent_tokens(config, config["_class_name"], noise.shape[1:])
    if is_flow(scheduler) and scheduler.config.get("use_dynamic_shifting"):
        options["mu"] = shift_exponent(scheduler.config, tokens)
    by_itself = not is_flow(scheduler) or scheduler.config.get("use_flow_sigmas")
    if family_of(config["_class_name"]).even_steps and not by_itself:
        options["sigmas"] = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
    else:
        options["num_inference_steps"] = steps
    scheduler.set_timesteps(**options)
    accepted = inspect.signature(scheduler.step).parameters
    more = {"generator": generator} if "generator" in accepted else {}

    distilled = bool(config.get("guidance_embeds"))
    guided = guidance_scale != 1 and not distilled
    if guided:
        free = {name: unconditional[name].to(value).expand_as(value) for name, value in conditions.items()}
        conditions = {name: torch.cat([value, free[name]]) for name, value in conditions.items()}
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        given = torch.cat([given, given]) if guided else given
        times = timestep.to(given.device).expand(len(given))
        prediction = predict(given, times, conditions, guidance_scale if distilled else 1.0).float()
        if guided:
            wished, unwished = prediction.chunk(2)
            prediction = unwished + guidance_scale * (wished - unwished)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **more)[0]
    return latents


def draw_prompts(
    model: nn.Module,
    config: Mapping[str, Any],
    scheduler: Any,
    pipeline: Any,
    prompts: Sequence[Sample],
    unconditional: Mapping[str, Tensor],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 50,
    state: ParallelState | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Draw prepared prompts: numbers of prompts, and pictures [C, H, W] or videos [C, F, H, W] in -1 .. 1.

    The data-parallel ranks of `state` share the prompts and call the model equally often; each gives its own. The noise
    of a prompt depends on the seed and its number alone.
    """
    family, was_training = family_of(config["_class_name"]), model.training
    dp_rank, dp_size = (state.dp.get_local_rank(), state.dp.size()) if state is not None else (0, 1)
    device = next(model.parameters()).device
    model.eval()
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        of_shape.setdefault(tuple(prompt["shape"]), []).append(number)
    for shape, numbers in of_shape.items():
        for start in range(0, len(numbers), batch_size * dp_size):
            group = numbers[start : start + batch_size * dp_size]
            share = -(-len(group) // dp_size)
            own = group[dp_rank * share : (dp_rank + 1) * share]
            present = own or group[:1]  # a rank without prompts draws one for company
            present = present + present[:1] * (share - len(present))
            generators = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in present]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            told = [conditions_of(prompts[number]) for number in present]
            latents = sample_latents(
                partial(family.predict, model, config),
                config,
                scheduler,
                noise.to(device),
                {name: torch.stack([each[name] for each in told]).to(device) for name in told[0]},
                {name: value.to(device) for name, value in unconditional.items()},
                steps=steps,
                guidance_scale=guidance_scale,
                generator=generators[0],
            )
            yield from zip(own, decode_latents(pipeline, latents).cpu(), strict=False)
    model.train(was_training)


@dataclass(frozen=True)
class Drawings:
    """The prompts of `data.eval_path`, drawn by the model in training; every rank calls the methods, rank 0 writes."""

    cfg: DitRecipeConfig
    model: nn.Module
    config: Mapping[str, Any]
    scheduler: Any
    unconditional: Mapping[str, Tensor]
    state: ParallelState
    pipeline: Any
    prompts: Sequence[Sample]

    def sheet(self, path: Path) -> None:
        """Draw the first `train.sample_count` prompts as a grid."""
        drawn = self._draw(self.prompts[: self.cfg.train.sample_count])
        if rank() == 0:
            path.parent.mkdir(exist_ok=True)
            draw_sheet([drawn[number] for number in sorted(drawn)], path)

    def all(self, folder: Path) -> None:
        """Draw all prompts into `drawings/`, with `predictions.jsonl` and a grid of the first, `samples.png`."""
        drawn = self._draw(self.prompts)
        if rank() == 0:
            (folder / "drawings").mkdir(exist_ok=True)
            files = [save_drawing(drawn[number], folder / "drawings" / f"{number:05}") for number in sorted(drawn)]
            write_json_lines(
                folder / "predictions.jsonl",
                (
                    {"prompt": prompt["prompt"], "drawing": str(file.relative_to(folder))}
                    for prompt, file in zip(self.prompts, files, strict=True)
                ),
            )
            draw_sheet([drawn[number] for number in sorted(drawn)[:80]], folder / "samples.png", columns=10)

    def _draw(self, prompts: Sequence[Sample]) -> dict[int, Tensor]:
        train = self.cfg.train
        own = draw_prompts(
            self.model.module if isinstance(self.model, DistributedDataParallel) else self.model,
            self.config,
            self.scheduler,
            self.pipeline,
            prompts,
            self.unconditional,
            steps=train.num_inference_steps,
            guidance_scale=train.guidance_scale,
            seed=train.seed,
            state=self.state,
        )
        return {number: picture for part in gather(dict(own)) for number, picture in part.items()}


def sample(
    folder: str | Path,
    prompts: Sequence[str],
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int = 28,
    guidance_scale: float = 4.0,
    seed: int = 0,
) -> list[list[Image]]:
    """Draw what prompts ask for, with a pipeline's folder that a run exported; a picture has one frame.

    Args:
        folder: with `transformer/`, `scheduler/` and whatever encodes prompts; or of adapters, whose
            `adapter_config.json` names that folder.
        prompts: texts, or names of classes.
        height, width, num_frames: of what is drawn, in pixels; None is the transformer's own size.
        num_inference_steps, guidance_scale: see `sample_latents`.
        seed: of the noise.
    """
    import diffusers

    folder = Path(folder)
    adapters = folder if (folder / "adapter_config.json").is_file() else None
    if adapters is not None:
        settings = json.loads((adapters / "adapter_config.json").read_text(encoding="utf-8"))
        folder = Path(settings["base_model_name_or_path"])
    there = torch.accelerator.is_available()
    device = torch.device(torch.accelerator.current_accelerator() or "cpu") if there else torch.device("cpu")
    model = diffusers.AutoModel.from_pretrained(str(folder / "transformer")).to(device)
    config = {**model.config, "_class_name": type(model).__name__}
    if adapters is not None:
        model.load_lora_adapter(str(adapters), prefix="transformer")
    index = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    scheduler = getattr(diffusers, index["_class_name"]).from_pretrained(folder / "scheduler")
    pipeline = load_encoders(folder, config, (), device)
    family = family_of(config["_class_name"])
    side = config.get("sample_size") or 64
    shape = latent_shape(pipeline, config, height or side, width or side, num_frames)
    if height is None and pipeline.vae is not None:
        shape = (*shape[:-2], side, side)
    asked = [family.encode(pipeline, prompt, None) | {"shape": shape} for prompt in prompts]
    drawn = draw_prompts(
        model,
        config,
        scheduler,
        pipeline,
        asked,
        family.encode(pipeline, "", None),
        steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
    )
    return [frames_of(picture) for _, picture in sorted(drawn, key=lambda each: each[0])]


def frames_of(picture: Tensor) -> list[Image]:
    """The frames of a video [C, F, H, W], or a picture [C, H, W] as the only one, from -1 .. 1."""
    from PIL import Image

    frames = picture.unsqueeze(1) if picture.dim() == 3 else picture
    values = ((frames + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).numpy()  # [F, H, W, C]
    return [Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame) for frame in values]


def save_drawing(picture: Tensor, path: Path) -> Path:
    """Write a picture as `path`.png, a video as `path`.gif; returns the file."""
    first, *others = frames_of(picture)
    if not others:
        first.save(path := path.with_suffix(".png"))
        return path
    path = path.with_suffix(".gif")
    first.save(path, save_all=True, append_images=others, duration=1000 // 16, loop=0)
    return path


def draw_sheet(pictures: Sequence[Tensor], path: Path, columns: int = 8, side: int = 96) -> None:
    """A grid of pictures, and of first, middle and last frames of videos, as a PNG."""
    from PIL import Image, ImageOps

    shown = []
    if any(picture.dim() == 4 for picture in pictures):
        columns -= columns % 3
    for picture in pictures:
        frames = frames_of(picture)
        shown += [frames[0]] if len(frames) == 1 else [frames[0], frames[len(frames) // 2], frames[-1]]
    sheet = Image.new("RGB", (columns * (side + 4), -(-len(shown) // columns) * (side + 4)), "white")
    for number, frame in enumerate(shown):
        resample = Image.Resampling.NEAREST if max(frame.size) < side else Image.Resampling.BICUBIC
        place = (number % columns * (side + 4) + 2, number // columns * (side + 4) + 2)
        sheet.paste(ImageOps.pad(frame.convert("RGB"), (side, side), resample, "white"), place)
    sheet.save(path)
