"""Keys of the configuration that a recipe does not act on: set to anything but their default, they are refused."""

from __future__ import annotations

from collections.abc import Sequence

from veomni_config import ConfigError, Problem, RecipeConfig

OMNI = (
    "data.data_type",
    "model.lora_config",
    "model.quantize_frozen",
    "train.train_architecture",
    "train.enable_fused_loss",
    "train.tensor_parallel_size",
    "train.expert_parallel_size",
    "train.ep_outside",
)
TEXT = (
    "train.eval_answers",
    "data.image_keys",
    "model.encoders",
    "model.decoders",
    "model.input_encoder",
    "model.output_encoder",
    "model.encode_target",
)
DISTILL = (*TEXT, "train.enable_fused_loss", "train.tensor_parallel_size")
DPO = (*DISTILL, "train.best_metric", "train.export_checkpoint")
VISION_LANGUAGE = (
    "data.data_type",
    "model.encoders",
    "model.decoders",
    "model.input_encoder",
    "model.output_encoder",
    "model.encode_target",
)


def refuse_without_effect(cfg: RecipeConfig, without: Sequence[str]) -> None:
    """Raise ConfigError for each key that would be passed over in silence, and for an evaluation without a model.

    Args:
        without: the keys, such as "train.optimizer", that the recipe does not act on.
    """
    problems = []
    for key in without:
        section, name = key.split(".")
        values = getattr(cfg, section)
        default = type(values).model_fields[name].get_default(call_default_factory=True)
        if getattr(values, name) != default:
            text = f"{getattr(values, name)!r} has no effect in this recipe; leave it at {default!r}"
            problems.append(Problem(key, text))
    answers, validates = "train.eval_answers" not in without, cfg.train.eval_steps or cfg.train.eval_epochs
    if validates and cfg.data.eval_path is None:
        text = "there is nothing to validate on: set data.eval_path to held-out data, or this to 0"
        problems.append(Problem("train.eval_steps" if cfg.train.eval_steps else "train.eval_epochs", text))
    if cfg.data.eval_path and not answers and not validates:
        text = "this recipe validates on it in training alone: set train.eval_epochs to 1, or this to null"
        problems.append(Problem("data.eval_path", text))
    if cfg.data.eval_path and answers and not cfg.train.save_hf_weights:
        text = (
            "the held-out data are answered by the exported model: set train.save_hf_weights to true, or this to null"
        )
        problems.append(Problem("data.eval_path", text))
    if cfg.train.eval_answers and answers and cfg.train.train_architecture == "lora":
        text = "a model with adapters is exported at the end alone: set it to 0, its loss is validated"
        problems.append(Problem("train.eval_answers", text))
    packed = cfg.train.rmpad or cfg.train.rmpad_with_pos_ids
    if cfg.train.ulysses_parallel_size > 1 and not packed:
        text = "the ranks of a row share it only if it is packed: set train.rmpad to true, or this to 1"
        problems.append(Problem("train.ulysses_parallel_size", text))
    if getattr(cfg.train, "freeze_encoder_all", False) and getattr(cfg.train, "freeze_foundation", False):
        text = "together with train.freeze_foundation nothing would learn: set one of them to false"
        problems.append(Problem("train.freeze_encoder_all", text))
    if problems:
        raise ConfigError(problems)
