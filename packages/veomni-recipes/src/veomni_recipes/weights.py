"""Which parts of an omni model learn, and which start from weights that somebody trained."""

from __future__ import annotations

from veomni_ckpt import load_pretrained
from veomni_config import ModelConfig, OmniTrainConfig
from veomni_models import OmniModel, is_omni_folder, load_encoders


def freeze_parts(model: OmniModel, train: OmniTrainConfig) -> None:
    """Parts that the configuration freezes keep their weights."""
    if train.freeze_foundation:
        model.foundation.requires_grad_(False)
    if train.freeze_encoder or train.freeze_encoder_all:
        model.encoders.requires_grad_(False)
    if train.freeze_encoder_all:
        model.projectors.requires_grad_(False)


def load_parts(model: OmniModel, cfg: ModelConfig) -> None:
    """Fill the parts of a sharded model whose `model_path` the configuration names: all or the foundation, encoders."""
    if cfg.model_path is not None:
        load_pretrained(model if is_omni_folder(cfg.model_path) else model.foundation, cfg.model_path)
    load_encoders(model, cfg.encoders)
