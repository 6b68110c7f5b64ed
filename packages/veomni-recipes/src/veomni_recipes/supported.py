"""Keys of the configuration that a recipe does not act on yet: set to anything but their default, they are refused."""

from __future__ import annotations

from veomni_config import ConfigError, Problem, RecipeConfig

_NOT_YET = (
    "data.data_type",
    "data.data_tag",
    "data.drop_resume_buffer",
    "data.max_pixels",
    "data.datasets_type",
    "data.enable_multisource",
    "data.max_image_nums",
    "data.max_pixel_size",
    "data.scale_factor",
    "data.generation_ratio",
    "model.decoders",
    "model.input_encoder",
    "model.output_encoder",
    "model.encode_target",
    "model.moe_implementation",
    "train.train_architecture",
    "train.optimizer",
    "train.vit_lr",
    "train.enable_reentrant",
    "train.dyn_bsz_margin",
    "train.bsz_warmup_ratio",
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
)


def refuse_without_effect(cfg: RecipeConfig) -> None:
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
    if problems:
        raise ConfigError(problems)
