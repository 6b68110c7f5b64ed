"""Omni models in the registries of transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from veomni_models.omni import OmniModel
from veomni_models.omni_config import OmniConfig
from veomni_models.omni_processor import OmniProcessor


def register_omni_model() -> None:
    """Let transformers' Auto classes load saved omni models and their processors. Repeating it is harmless."""
    AutoConfig.register(OmniConfig.model_type, OmniConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto.register(OmniConfig, OmniModel, exist_ok=True)
    AutoProcessor.register(OmniConfig, OmniProcessor, exist_ok=True)
