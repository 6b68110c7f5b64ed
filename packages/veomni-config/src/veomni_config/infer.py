"""The `infer` section: how a trained model answers."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .section import Section, rule


class InferConfig(Section):
    """Which model answers, and how its tokens are drawn."""

    model_path: str = Field(min_length=1, description="Folder (or hub id) of the weights to answer with.")
    tokenizer_path: str | None = Field(
        default=None, description="Folder (or hub id) of the tokenizer or processor; falls back to `infer.model_path`."
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of the sampling.")
    do_sample: bool = Field(
        default=True, description="Whether tokens are drawn at random; else the likeliest one is taken."
    )
    temperature: float = Field(
        default=1.0, ge=0, description="Divides the logits before a token is drawn; below 1 is bolder."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the probability that the likeliest tokens must reach to be drawn from.",
    )
    max_tokens: int = Field(default=1024, ge=1, description="New tokens at most.")

    def derive(self) -> dict[str, Any]:
        """The tokenizer lies beside the weights."""
        return {"tokenizer_path": self.tokenizer_path or self.model_path}

    @rule("temperature", "do_sample")
    def _no_sampling_at_zero(self) -> str | None:
        if self.do_sample and self.temperature == 0:
            return "nothing can be drawn at temperature 0: set do_sample to false, or temperature to 0.7"
        return None
