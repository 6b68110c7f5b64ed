"""Which parts of an omni model learn, and which start from weights that somebody trained."""

from __future__ import annotations

from fnmatch import fnmatchcase

from veomni_ckpt import load_pretrained
from veomni_config import ConfigError, ModelConfig, OmniTrainConfig, Problem
from veomni_models import OmniModel, is_omni_folder, load_decoders, load_encoders

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
    names = dict(model.named_parameters())
    check_globs("train.freeze_params", train.freeze_params, names)
    for name, parameter in names.items():
        if any(fnmatchcase(name, glob) for glob in train.freeze_params):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError([Problem("train.freeze_params", "nothing would learn: leave some parameters out of it")])


def learning_rates(model: OmniModel, train: OmniTrainConfig) -> dict[str, float]:
    """Peak learning rates of parts of the model by globs of names, of which the last that matches counts."""
    encoders = [f"encoders.{kind}.*" for kind in ("image", "video") if kind in model.encoders]
    vision = {} if train.vit_lr is None else dict.fromkeys(encoders, train.vit_lr)
    return {**vision, **train.param_lrs}


def load_parts(model: OmniModel, cfg: ModelConfig) -> None:
    """Fill the parts of a sharded model whose `model_path` the configuration names."""
    if cfg.model_path is not None:
        load_pretrained(model if is_omni_folder(cfg.model_path) else model.foundation, cfg.model_path)
    load_encoders(model, cfg.encoders)
    load_decoders(model, cfg.decoders)
