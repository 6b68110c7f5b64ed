"""Which parts of a model learn, which start from weights that somebody trained, and how it is exported."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from veomni_ckpt import export_hf, load_pretrained
from veomni_config import (
    ConfigError,
    ModelConfig,
    OmniTrainConfig,
    PartsTrainConfig,
    Problem,
    RecipeConfig,
    VLTrainConfig,
)
from veomni_models import (
    OmniModel,
    add_adapters,
    build_foundation_model,
    has_adapters,
    initialize_adapters,
    initialize_weights,
    is_omni_folder,
    load_decoders,
    load_encoders,
    merge_adapters,
    save_adapters,
    without_adapters,
)

from veomni_recipes.distributed import rank
from veomni_recipes.optimization import check_globs


def freeze_parts(model: OmniModel, train: OmniTrainConfig) -> None:
    """Parts that the configuration freezes keep their weights."""
    if train.freeze_foundation:
        model.foundation.requires_grad_(False)
    if train.freeze_encoder or train.freeze_encoder_all:
        model.encoders.requires_grad_(False)
    if train.freeze_encoder_all:
        model.projectors.requires_grad_(False)
    if train.freeze_decoder:
        model.decoders.requires_grad_(False)
    _freeze_params(model, train)


def learning_rates(model: OmniModel, train: OmniTrainConfig) -> dict[str, float]:
    """Peak learning rates of parts of the model by globs of names, of which the last that matches counts."""
    encoders = [f"encoders.{kind}.*" for kind in ("image", "video") if kind in model.encoders]
    vision = {} if train.vit_lr is None else dict.fromkeys(encoders, train.vit_lr)
    return {**vision, **train.param_lrs}


def encoders_of(model: Any) -> dict[str, str]:
    """ "image" and "audio", as far as a transformers model reads them, to the name of the module that encodes them."""
    found = {}
    for kind, part in (("image", "vision_config"), ("audio", "audio_config")):
        config = getattr(model.config, part, None)
        if config is not None:
            modules = model.named_modules()  # from the outside to the inside
            found[kind] = next(n for n, m in modules if type(getattr(m, "config", None)) is type(config))
    return found


def freeze_encoders(model: Any, train: VLTrainConfig) -> None:
    """Encoders of a transformers model, and other parameters, that the configuration freezes keep their weights.

    Raises:
        ConfigError: the model has no such encoder, a glob matches nothing, or nothing would learn.
    """
    encoders = encoders_of(model)
    for key, kind, frozen in (
        ("train.freeze_vit", "image", train.freeze_vit),
        ("train.freeze_audio_tower", "audio", train.freeze_audio_tower),
    ):
        if frozen and kind not in encoders:
            raise ConfigError([Problem(key, f"{type(model).__name__} has no such encoder: leave it at false")])
        if frozen:
            model.get_submodule(encoders[kind]).requires_grad_(False)
    _freeze_params(model, train)


def learning_rates_of_encoders(model: Any, train: VLTrainConfig) -> dict[str, float]:
    """Peak learning rates of parts of a transformers model by globs, of which the last that matches counts."""
    vision = encoders_of(model).get("image")
    return {**({} if train.vit_lr is None or vision is None else {f"{vision}.*": train.vit_lr}), **train.param_lrs}


def _freeze_params(model: Any, train: PartsTrainConfig) -> None:
    names = dict(model.named_parameters())
    check_globs("train.freeze_params", train.freeze_params, names)
    for name, parameter in names.items():
        if any(fnmatchcase(name, glob) for glob in train.freeze_params):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError([Problem("train.freeze_params", "nothing would learn: leave some parameters out of it")])


def load_parts(model: OmniModel, cfg: ModelConfig) -> None:
    """Fill the parts of a sharded model whose `model_path` the configuration names."""
    if cfg.model_path is not None:
        load_pretrained(model if is_omni_folder(cfg.model_path) else model.foundation, cfg.model_path)
    load_encoders(model, cfg.encoders)
    load_decoders(model, cfg.decoders)


def fill_foundation(model: Any, cfg: RecipeConfig, device: torch.device) -> None:
    """Give a sharded model from meta its weights, and adapters their first values.

    Weights come from `model.model_path`, or are drawn; one that was built elsewhere than on meta has them already.
    """
    if cfg.train.init_device == "meta":
        with without_adapters(model):
            initialize_weights(model, cfg.train.seed, device)
            if cfg.model.model_path is not None:
                load_pretrained(model, cfg.model.model_path)
    if has_adapters(model):
        initialize_adapters(_unwrapped(model), cfg.train.seed, device)


def export(model: Any, folder: Path, cfg: RecipeConfig, assets: Sequence[Any]) -> None:
    """Write `hf_ckpt/` into the folder of a run; of a model with adapters, these in `adapter/` and it with them merged.

    Where frozen layers were quantised, adapters are merged with the weights as they were before.

    Args:
        assets: what else belongs to the model: see `export_hf`.
    """
    if has_adapters(model):
        save_adapters(_unwrapped(model), folder / "adapter", base=cfg.model.model_path, write=rank() == 0)
        if cfg.model.quantize_frozen:
            model = _with_whole_weights(_unwrapped(model), cfg)
        else:
            merge_adapters(model)
    with without_adapters(model):
        export_hf(model, folder / "hf_ckpt", assets=assets)


@torch.no_grad()
def _with_whole_weights(model: Any, cfg: RecipeConfig) -> Any:
    """The model as it was before its frozen layers were quantised, with its adapters merged: in rank 0's host memory.

    Other ranks get one without storage, of which the export takes nothing.
    """
    whole = build_foundation_model(
        copy.deepcopy(model.config),
        cfg.model.model_path,
        init_device="cpu" if rank() == 0 else "meta",
        seed=cfg.train.seed,
    )
    add_adapters(whole, cfg.model.lora_config)
    if rank() == 0:
        trained = dict(model.named_parameters())
        for name, parameter in whole.named_parameters():
            if ".lora_" in name:
                parameter.copy_(trained[name])
        merge_adapters(whole)
    return whole


def _unwrapped(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model
