"""Every architecture of transformers that writes text: found in its mappings, made tiny."""

from __future__ import annotations

from typing import Any

import veomni_models


def architectures() -> list[str]:
    """The model types of all that have a causal or conditional generation class for text."""
    from transformers.models.auto import modeling_auto as auto

    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def tiny_config(name: str) -> Any:
    """The tiny config of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return veomni_models.tiny_config(CONFIG_MAPPING[name]())
