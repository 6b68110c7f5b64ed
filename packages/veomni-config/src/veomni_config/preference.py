"""Keys that the recipe of preference optimization adds to the sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .data import DataConfig
from .recipe import RecipeConfig
from .section import rule
from .train import TrainConfig


class DPODataConfig(DataConfig):
    """Pairs of answers."""

    data_type: Literal["preference"] = Field(
        default="preference", description="Kind of a sample: a chosen and a rejected answer to the same prompt."
    )


class DPOTrainConfig(TrainConfig):
    """Preference optimization."""

    dpo_loss: Literal["sigmoid", "ipo", "simpo", "orpo"] = Field(
        default="sigmoid",
        description="Loss of a pair: `sigmoid` (DPO) and `ipo` compare with a reference model, which is a frozen copy "
        "of the model, or with adapters the model without them; `simpo` and `orpo` have no reference.",
    )
    dpo_beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the pull towards the reference (`sigmoid`, `ipo`), factor of the rewards (`simpo`, "
        "often 2), or weight of the odds ratio (`orpo`).",
    )
    dpo_label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Share of the pairs that are taken to be labelled wrongly (`sigmoid`)."
    )
    simpo_margin: float = Field(
        default=1.0, ge=0, description="Rewards by which a chosen answer is to be ahead of a rejected one (`simpo`)."
    )

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return self.dpo_loss in ("sigmoid", "ipo")

    @rule("dpo_label_smoothing", "dpo_loss")
    def _smoothing_is_of_the_sigmoid(self) -> str | None:
        if self.dpo_label_smoothing and self.dpo_loss != "sigmoid":
            return "only the sigmoid loss is smoothed: set dpo_loss to sigmoid, or dpo_label_smoothing to 0"
        return None

    @rule("rmpad", "rmpad_with_pos_ids")
    def _pairs_are_packed(self) -> str | None:
        if not (self.rmpad or self.rmpad_with_pos_ids):
            return "the two answers of a pair stand in one packed row: set rmpad to true"
        return None


class DPORecipeConfig(RecipeConfig):
    """Configuration of the recipe of preference optimization."""

    data: DPODataConfig
    train: DPOTrainConfig

    @rule("data.too_long")
    def _pairs_are_whole(self) -> str | None:
        if self.data.too_long != "drop":
            return "a pair cannot be cut: leave it at drop, and data.max_seq_len above the tokens of both answers"
        return None
