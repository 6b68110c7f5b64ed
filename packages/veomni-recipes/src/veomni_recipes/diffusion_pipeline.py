"""The folder of a diffusers pipeline: a transformer built from it, its encoders, and a trained one put back into it."""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from veomni_ckpt import export_hf, load_pretrained
from veomni_config import ConfigError, DitModelConfig, Problem
from veomni_models import without_adapters

from veomni_recipes.diffusion_transformers import Family, family_of
from veomni_recipes.distributed import barrier, rank


def pipeline_folder(model_path: str) -> Path:
    """The folder of a pipeline; one of the hub is fetched.

    Raises:
        ConfigError: there is none.
    """
    import diffusers

    try:
        path = Path(model_path) if Path(model_path).is_dir() else Path(diffusers.DiffusionPipeline.download(model_path))
        json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except Exception as error:  # whatever the hub's client raises
        reason = str(error).strip().partition("\n")[0]
        text = f"{model_path} is no folder of a diffusers pipeline, with a model_index.json: {reason}"
        raise ConfigError([Problem("model.model_path", text)]) from error
    return path


def transformer_config(model: DitModelConfig) -> dict[str, Any]:
    """The configuration of the transformer, with the keys that are set anew; `_class_name` is among them.

    Raises:
        ConfigError: the class is not known, is another one than the folder's, or has no such key.
    """
    import diffusers

    config: dict[str, Any] = {}
    if model.model_path:
        path = pipeline_folder(model.model_path) / "transformer" / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
    name = str(model.transformer.get("_class_name", config.get("_class_name")))
    if config and name != config["_class_name"]:
        text = f"{name} given, but {model.model_path} holds a {config['_class_name']}"
        raise ConfigError([Problem("model.transformer._class_name", text)])
    family_of(name)
    known = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    unknown = [key for key in model.transformer if key not in known and key != "_class_name"]
    if unknown:
        text = f"{', '.join(unknown)}: {name} has no such key; it has {', '.join(sorted(known))}"
        raise ConfigError([Problem("model.transformer", text)])
    return {key: value for key, value in config.items() if key in known} | model.transformer | {"_class_name": name}


def build_transformer(config: Mapping[str, Any], *, seed: int, on_meta: bool = False) -> nn.Module:
    """A transformer with weights drawn by a seed, or with parameters on the meta device and buffers in memory."""
    import diffusers
    from accelerate import init_empty_weights

    keys = {key: value for key, value in config.items() if not key.startswith("_")}
    cls = getattr(diffusers, config["_class_name"])
    try:
        if on_meta:
            with init_empty_weights():
                model = cls(**keys)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = cls(**keys)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        text = f"{config['_class_name']} cannot be built of these keys: {error}"
        raise ConfigError([Problem("model.transformer", text)]) from error
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0  # conditions are dropped by sample, whatever the number of ranks
    return model.train()


def load_transformer(model: nn.Module, folder: Path | None, device: torch.device) -> None:
    """Fill a transformer, sharded or not, with the weights of a pipeline's folder; what is on meta gets its memory.

    Adapters are left alone; without a folder all weights are.
    """
    if folder is not None:
        with without_adapters(model):
            fill_transformer(model, folder / "transformer", device)


def fill_transformer(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Fill a transformer, sharded or not, with the weights in a folder, those of adapters too if it has any."""
    saved = model.state_dict().keys()
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    load_pretrained(model, folder, device=device)
    for name, buffer in model.named_buffers():  # memory for what was on meta is new memory for all
        if name in computed:
            buffer.copy_(computed[name])


def load_scheduler(model: DitModelConfig) -> Any:
    """The noise scheduler of a pipeline's folder, with the keys that are set anew; without a folder flow matching.

    Raises:
        ConfigError: diffusers has no such scheduler, or it has no such key.
    """
    import diffusers

    config: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    if model.model_path:
        path = pipeline_folder(model.model_path) / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
    name = model.scheduler.get("_class_name", config["_class_name"])
    cls = getattr(diffusers, str(name), None)
    if cls is None or not name.endswith("Scheduler"):
        raise ConfigError([Problem("model.scheduler._class_name", f"diffusers has no scheduler {name}")])
    known = set(inspect.signature(cls.__init__).parameters)
    if unknown := [key for key in model.scheduler if key not in known and key != "_class_name"]:
        text = f"{', '.join(unknown)}: {name} has no such key; it has {', '.join(sorted(known - {'self'}))}"
        raise ConfigError([Problem("model.scheduler", text)])
    return cls.from_config(config | model.scheduler)


def load_encoders(
    folder: Path | None,
    config: Mapping[str, Any],
    labels: Sequence[str],
    device: torch.device,
    *,
    only_vae: bool = False,
) -> Any:
    """What turns prompts and pictures into what a transformer is given: its pipeline, without the transformer.

    Args:
        folder: of the pipeline; None: prompts are the names of classes, and latents are the pixels themselves.
        config: the transformer's.
        labels: names of the classes, where there is no folder or it does not name them.
        device: to put text encoders and VAE on, in bfloat16 if that is an accelerator.
        only_vae: leave out what encodes prompts.
    """
    import diffusers

    family = family_of(config["_class_name"])
    if folder is None:
        pipeline: Any = SimpleNamespace(vae=None, labels={name: number for number, name in enumerate(labels)})
    else:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [name for name in index if name.startswith(("text_encoder", "tokenizer"))] if only_vae else []
        cls = getattr(diffusers, family.pipeline)
        absent = [name for name, part in index.items() if isinstance(part, list) and part[0] is None]
        without = dict.fromkeys(["transformer", *parts, *absent])
        pipeline = cls.from_pretrained(folder, **without, torch_dtype=dtype).to(device)
        pipeline.set_progress_bar_config(disable=True)
    if family.pipeline == "DiTPipeline" and not only_vae:
        pipeline.null_label = config["num_embeds_ada_norm"]
        if not pipeline.labels:
            text = f"a {config['_class_name']} is asked by the names of its classes: name them"
            raise ConfigError([Problem("model.labels", text)])
    return pipeline


@torch.no_grad()
def encode_pixels(pipeline: Any, config: Mapping[str, Any], pixels: Tensor) -> Tensor:
    """The latents of pictures [B, 3, H, W] or videos [B, 3, F, H, W] in -1 .. 1: the mean of the VAE's distribution.

    Without a VAE they are the pixels, or their mean colour where the transformer has one channel.
    """
    vae = pipeline.vae
    if vae is None:
        return pixels.mean(1, keepdim=True) if config["in_channels"] == 1 else pixels
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = _scale(vae, latents)
    return (latents - mean) / std


@torch.no_grad()
def decode_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Pictures [B, C, H, W] or videos [B, C, F, H, W] in -1 .. 1 of latents [B, ...]."""
    vae = pipeline.vae
    if vae is not None:
        mean, std = _scale(vae, latents)
        latents = vae.decode((latents * std + mean).to(vae.device, vae.dtype), return_dict=False)[0].float()
    return latents.clamp(-1, 1)


def _scale(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """What is taken off a VAE's latents, and what they are divided by."""
    config = vae.config
    if config.get("latents_mean") is not None:
        column = (1, -1, *[1] * (latents.dim() - 2))
        mean, std = (latents.new_tensor(config[f"latents_{name}"]).view(column) for name in ("mean", "std"))
        return mean, std
    shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    return latents.new_tensor(shift), latents.new_tensor(1 / scale)


def latent_shape(
    pipeline: Any, config: Mapping[str, Any], height: int, width: int, frames: int | None = None
) -> tuple[int, ...]:
    """The shape [C, H, W] or [C, F, H, W] of the latents of a picture or video."""
    vae = pipeline.vae
    if vae is None:
        return (config["in_channels"], height, width)
    channels = vae.config.get("latent_channels") or vae.config["z_dim"]
    levels = len(vae.config.get("block_out_channels") or ())
    spatial = getattr(pipeline, "vae_scale_factor_spatial", 0) or 2 ** (levels - 1)
    sides = (height // spatial, width // spatial)
    if _moves(config):
        return (channels, ((frames or 1) - 1) // pipeline.vae_scale_factor_temporal + 1, *sides)
    return (channels, *sides)


def _moves(config: Mapping[str, Any]) -> bool:
    return "3D" in config["_class_name"]


def export_pipeline(
    model: nn.Module, folder: Path, *, family: Family, scheduler: Any, base: Path | None, labels: Sequence[str]
) -> None:
    """Write a pipeline's folder with the trained transformer: all ranks call it, rank 0 writes.

    What was not trained (text encoders, VAE, tokenizers) are hard links to the files of `base`, which take no room, or
    copies where the file system cannot link.
    """
    import diffusers

    class_name = type(getattr(model, "module", model)).__name__.removeprefix("FSDP")
    partial = folder.with_name(f".{folder.name}.partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    export_hf(model, partial / "transformer")
    if rank() == 0:
        scheduler.save_pretrained(partial / "scheduler")
        index: dict[str, Any] = {
            "_class_name": family.pipeline,
            "_diffusers_version": diffusers.__version__,
            "vae": [None, None],
        }
        if base is not None:
            index |= json.loads((base / "model_index.json").read_text(encoding="utf-8"))
            for part, (library, _) in ((k, v) for k, v in index.items() if isinstance(v, list)):
                if library is not None and part not in ("transformer", "scheduler"):
                    shutil.copytree(base / part, partial / part, copy_function=_link)
        elif labels:
            index["id2label"] = {str(number): name for number, name in enumerate(labels)}
        index |= {"transformer": ["diffusers", class_name], "scheduler": ["diffusers", type(scheduler).__name__]}
        (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    barrier()


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def export_adapters(model: nn.Module, folder: Path, *, family: Family, base: Path | None) -> None:
    """Write what LoRA trained as a folder that the pipeline's `load_lora_weights` takes: all ranks call it.

    Its `adapter_config.json` is peft's, and names the pipeline's folder that the adapters belong to.
    """
    import diffusers

    inner = getattr(model, "module", model)
    tensors = {}
    for name, parameter in inner.named_parameters():
        if ".lora_" in name:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            tensors[name.replace(".default.", ".")] = whole.detach().cpu()
    if rank() == 0:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        config = copy.deepcopy(inner.peft_config["default"])
        config.base_model_name_or_path = str(base.resolve()) if base is not None else None
        getattr(diffusers, family.pipeline).save_lora_weights(
            partial, transformer_lora_layers=tensors, transformer_lora_adapter_metadata=config.to_dict()
        )
        config.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    barrier()
