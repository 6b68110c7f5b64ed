"""What is needed to run samples of a run again: its model as it was in a step, its data, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from veomni_ckpt import CheckpointManager, load_pretrained
from veomni_config import DitRecipeConfig, parse_args
from veomni_data import DataDescription, Sample, build_dataset, build_pipeline, read_ledger
from veomni_models import (
    OmniConfig,
    OmniModel,
    add_adapters,
    build_foundation_model,
    is_omni_folder,
    quantize_frozen,
    register_omni_model,
)
from veomni_parallel import ParallelPlan, build_parallelize_model, init_parallel_state

from veomni_recipes.black_box import WEIGHTS
from veomni_recipes.denoising import Denoising
from veomni_recipes.diffusion_data import read_sample, read_unconditional, stack_samples
from veomni_recipes.diffusion_pipeline import (
    build_transformer,
    fill_transformer,
    load_scheduler,
    load_transformer,
    pipeline_folder,
    transformer_config,
)
from veomni_recipes.diffusion_transformers import count_latent_tokens, family_of
from veomni_recipes.errors import TrainingError
from veomni_recipes.multimodal_data import rope_positions

_MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "target_pixel_values")


@dataclass(frozen=True)
class Rerun:
    """A step of a run, on one device.

    Attributes:
        model: wrapped, in the precision of the run.
        weights: where its weights are from.
        dataset: of the run.
        collate: samples -> batch.
        loss: (batch, targets, arguments=...) -> the sum over the batch's targets divided by that number of them;
            `arguments` are those that `BlackBox.begin` was given.
        notes: (sample) -> what there is to say of it.
    """

    model: nn.Module
    weights: str
    dataset: Any
    collate: Callable[[Sequence[Sample]], dict[str, Any]]
    loss: Callable[..., Tensor]
    notes: Callable[[Sample], list[str]]


def open_rerun(run: Path, folder: Path, step: int, dp_rank: int, device: torch.device) -> Rerun:
    """Make ready to run a step again.

    Args:
        run: its folder.
        folder: what the black box has left of the step.
        step: of the run.
        dp_rank: one of the data-parallel ranks that there were in it.
        device: of this process.

    Raises:
        TrainingError: there are no weights to run it with.
        ConfigError, DataError, ModelError: what the run was made of is not there any more.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    wrap: dict[str, Any] = {"mixed_precision": "bf16" if config["train"].get("enable_mixed_precision", True) else None}
    if config["data"].get("data_type") == "diffusion":
        return _of_latents(run, folder, step, device, wrap)
    return _of_tokens(run, folder, step, dp_rank, device, wrap, config)


def _of_tokens(
    run: Path,
    folder: Path,
    step: int,
    dp_rank: int,
    device: torch.device,
    wrap: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Rerun:
    """Of models of transformers, and omni models."""
    omni = is_omni_folder(folder)
    adapted = config["train"].get("train_architecture") == "lora"
    if (folder / WEIGHTS).is_dir():
        weights = _of_the_step(folder)
        if omni:
            plain: Any = OmniModel.from_pretrained(folder / WEIGHTS).to(device).train()
        else:
            own = None if adapted else folder / WEIGHTS
            plain = build_foundation_model(folder / WEIGHTS, own, init_device=str(device))
        if adapted:
            add_adapters(plain, config["model"]["lora_config"])
            load_pretrained(plain, folder / WEIGHTS)
    else:
        saved = _checkpoint_before(run, folder, step)
        if omni:
            plain = OmniModel(OmniConfig.from_pretrained(folder)).to(device).train()
        else:
            base = config["model"].get("model_path") if adapted else None  # of adapters a checkpoint holds nothing else
            plain = build_foundation_model(folder, base, init_device=str(device))
        if adapted:
            if bits := config["model"].get("quantize_frozen"):
                quantize_frozen(plain.requires_grad_(False), bits)
            add_adapters(plain, config["model"]["lora_config"])
        weights = _load_checkpoint(run, saved, step, plain)
    model = build_parallelize_model(plain, init_parallel_state(device_type=device.type), **wrap)

    register_omni_model()  # so that its processor is one for transformers
    ledger = read_ledger(run)
    pipeline = build_pipeline(DataDescription.from_dict(ledger.manifest["description"]))
    if pipeline.processor is not None and not isinstance(plain, OmniModel):  # whose samples have the model's positions
        encode: Any = pipeline.transform
        pipeline = replace(pipeline, transform=partial(encode, position_ids=rope_positions(plain.config)))

    def loss(batch: Mapping[str, Any], targets: int, arguments: Mapping[str, Any]) -> Tensor:
        made: Tensor = model(**batch, num_items_in_batch=targets, use_cache=False, **arguments).loss
        return made

    return Rerun(
        model,
        weights,
        pipeline.dataset(),
        pipeline.collator(ledger.find(step, dp_rank)[0].settings["packing"]),
        loss,
        lambda sample: [key for key in _MEDIA if key in sample],
    )


def _of_latents(run: Path, folder: Path, step: int, device: torch.device, wrap: Mapping[str, Any]) -> Rerun:
    """Of transformers of diffusers; noise and times are those of the step."""
    cfg = parse_args(DitRecipeConfig, [str(run / "config.yaml")])
    config, has_weights = transformer_config(cfg.model), (folder / WEIGHTS).is_dir()
    family, saved = family_of(config["_class_name"]), 0
    if not has_weights:
        saved = _checkpoint_before(run, folder, step)
    plain: Any = build_transformer(config, seed=cfg.train.seed, on_meta=has_weights)
    if not has_weights:  # of adapters a checkpoint holds nothing else
        plain = plain.to(device)
        load_transformer(plain, pipeline_folder(cfg.model.model_path) if cfg.model.model_path else None, device)
    if cfg.train.train_architecture == "lora":
        add_adapters(plain, cfg.model.lora_config)
    if has_weights:
        fill_transformer(plain, folder / WEIGHTS, device)
    weights = _of_the_step(folder) if has_weights else _load_checkpoint(run, saved, step, plain)
    plan = ParallelPlan(no_shard=family.whole)
    model = build_parallelize_model(plain, init_parallel_state(device_type=device.type), plan=plan, **wrap)

    denoising = Denoising(
        partial(family.predict, model, config),
        load_scheduler(cfg.model),
        {name: value.to(device) for name, value in read_unconditional(cfg.data.train_path).items()},
        cfg.model.embedded_guidance,
        cfg.train,
    )

    def loss(batch: Mapping[str, Any], targets: int, arguments: Mapping[str, Any]) -> Tensor:
        return denoising.loss(batch, step) / targets

    def notes(sample: Sample) -> list[str]:
        drawn = denoising.draws(stack_samples([sample]), step)
        told = "without its prompt" if drawn.dropped else f'prompt "{sample["prompt"]}"'
        return [told, f"time {drawn.time.item():.3f}"]

    encoded = partial(read_sample, count_tokens=partial(count_latent_tokens, config, config["_class_name"]))
    dataset = build_dataset(cfg.data.train_path, transform=encoded)
    return Rerun(model, weights, dataset, stack_samples, loss, notes)


def _of_the_step(folder: Path) -> str:
    return f"those of the step ({folder / WEIGHTS})"


def _checkpoint_before(run: Path, folder: Path, step: int) -> int:
    """The newest checkpoint before a step of which there are no weights."""
    checkpoints = run / "checkpoints"
    saved = [int(path.name.removeprefix("global_step_")) for path in checkpoints.glob("global_step_*")]
    before = [number for number in saved if number < step]
    if not before:
        raise TrainingError(
            f"{folder} has no {WEIGHTS}, as its ranks could not save them together, and {checkpoints} has no "
            f"checkpoint before step {step}: there is nothing to run it with"
        )
    return max(before)


def _load_checkpoint(run: Path, saved: int, step: int, model: nn.Module) -> str:
    CheckpointManager(run / "checkpoints").load(saved, model)
    return f"those of the checkpoint of step {saved}, {step - 1 - saved} steps before this one began"
