"""Typed YAML and command-line configuration, where no mistake costs a run."""

from .batch_plan import BatchPlan, plan_batches
from .data import DataConfig
from .distill import DistillModelConfig, DistillRecipeConfig, DistillTrainConfig
from .dit import DitDataConfig, DitModelConfig, DitRecipeConfig, DitTrainConfig
from .errors import ConfigError, Origin, Problem
from .infer import EvaluateConfig, InferConfig
from .model import ModelConfig
from .omni import (
    OmniDataConfig,
    OmniRecipeConfig,
    OmniTrainConfig,
    PartsTrainConfig,
    VLDataConfig,
    VLRecipeConfig,
    VLTrainConfig,
)
from .parse import ConfigWarning, parse_args
from .preference import DPODataConfig, DPORecipeConfig, DPOTrainConfig
from .recipe import EvaluateRecipeConfig, InferRecipeConfig, RecipeConfig
from .section import Section, rule
from .train import TrainConfig
from .yaml_writer import dump_config

__all__ = [
    "BatchPlan",
    "ConfigError",
    "ConfigWarning",
    "DPODataConfig",
    "DPORecipeConfig",
    "DPOTrainConfig",
    "DataConfig",
    "DistillModelConfig",
    "DistillRecipeConfig",
    "DistillTrainConfig",
    "DitDataConfig",
    "DitModelConfig",
    "DitRecipeConfig",
    "DitTrainConfig",
    "EvaluateConfig",
    "EvaluateRecipeConfig",
    "InferConfig",
    "InferRecipeConfig",
    "ModelConfig",
    "OmniDataConfig",
    "OmniRecipeConfig",
    "OmniTrainConfig",
    "Origin",
    "PartsTrainConfig",
    "Problem",
    "RecipeConfig",
    "Section",
    "TrainConfig",
    "VLDataConfig",
    "VLRecipeConfig",
    "VLTrainConfig",
    "dump_config",
    "parse_args",
    "plan_batches",
    "rule",
]
