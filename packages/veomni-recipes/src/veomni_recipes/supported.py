"""Keys of the configuration that a recipe does not act on yet: set to anything but their default, they are refused."""

from __future__ import annotations

from veomni_config import ConfigError, OmniRecipeConfig, Problem

_NOT_YET = (
    "data.data_type",
    "data.generation_ratio",
    "model.input_encoder",
    "model.output_encoder",
    "model.encode_target",
    "model.moe_implementation",
    "train.train_architecture",
    "train.optimizer",
    "train.enable_reentrant",
    "train.enable_fsdp_offload",
    "train.enable_activation_offload",
    "train.enable_full_determinism",
    "train.enable_compile",
    "train.enable_profiling",
    "train.tensor_parallel_size",
    "train.expert_parallel_size",
    "train.use_wandb",
    "train.async_enabled",
    "train.save_initial_model",
    "train.ep_outside",
)


def refuse_without_effect(cfg: OmniRecipeConfig) -> None:
    """Raise ConfigError for each key that would be passed over in silence, and for an evaluation without a model."""
    problems = []
    for key in _NOT_YET:
        section, name = key.split(".")
        values = getattr(cfg, section)
        default = type(values).model_fields[name].default
        if getattr(values, name) != default:
            text = f"{getattr(values, name)!r} has no effect in this recipe yet; leave it at {default!r}"
            problems.append(Problem(key, text))
    if cfg.data.eval_path and not cfg.train.save_hf_weights:
        text = (
            "the held-out data are answered by the exported model: set train.save_hf_weights to true, or this to null"
        )
        problems.append(Problem("data.eval_path", text))
    packed = cfg.train.rmpad or cfg.train.rmpad_with_pos_ids
    if cfg.train.ulysses_parallel_size > 1 and not packed:
        text = "the ranks of a row share it only if it is packed: set train.rmpad to true, or this to 1"
        problems.append(Problem("train.ulysses_parallel_size", text))
    if cfg.train.freeze_encoder_all and cfg.train.freeze_foundation:
        text = "together with train.freeze_foundation nothing would learn: set one of them to false"
        problems.append(Problem("train.freeze_encoder_all", text))
    if problems:
        raise ConfigError(problems)
