"""Typed YAML and command-line configuration, where no mistake costs a run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .batch_plan import BatchPlan, plan_batches
from .data import DataConfig
from .errors import ConfigError, Origin, Problem
from .infer import EvaluateConfig, InferConfig
from .model import ModelConfig
from .parse import ConfigWarning, parse_args
from .recipe import EvaluateRecipeConfig, InferRecipeConfig, RecipeConfig
from .section import Section, rule
from .train import TrainConfig
from .yaml_writer import dump_config

if TYPE_CHECKING:
    from .distill import DistillModelConfig, DistillRecipeConfig, DistillTrainConfig
    from .dit import DitDataConfig, DitModelConfig, DitRecipeConfig, DitTrainConfig
    from .omni import (
        OmniDataConfig,
        OmniRecipeConfig,
        OmniTrainConfig,
        PartsTrainConfig,
        VLDataConfig,
        VLRecipeConfig,
        VLTrainConfig,
    )
    from .preference import DPODataConfig, DPORecipeConfig, DPOTrainConfig

# a run needs the keys of one recipe, and pydantic takes its time for each
_WHEN_ASKED_FOR = {
    "Distill": "distill",
    "Dit": "dit",
    "Omni": "omni",
    "Parts": "omni",
    "VL": "omni",
    "DPO": "preference",
}

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


def __getattr__(name: str) -> Any:
    module = next((module for prefix, module in _WHEN_ASKED_FOR.items() if name.startswith(prefix)), None)
    if module is None or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{module}", __name__), name)
