"""Keys that the recipe of distillation adds to the sections."""

from __future__ import annotations

from pydantic import Field

from .model import ModelConfig
from .recipe import RecipeConfig
from .train import TrainConfig


class DistillModelConfig(ModelConfig):
    """The student; its tokenizer is the teacher's, if no other is named."""

    teacher_path: str = Field(
        min_length=1, description="Folder (or hub id) of the teacher, which has the student's vocabulary."
    )

    def derive(self) -> dict[str, object]:
        """The tokenizer of the teacher."""
        derived = super().derive()
        return derived | {"tokenizer_path": derived["tokenizer_path"] or self.teacher_path}


class DistillTrainConfig(TrainConfig):
    """Distillation."""

    distill_weight: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the teacher's distribution in the loss, from 0 to 1; the rest is that of the data.",
    )
    distill_temperature: float = Field(
        default=1.0,
        gt=0,
        description="What the logits of teacher and student are divided by; above 1 the unlikely tokens count more.",
    )


class DistillRecipeConfig(RecipeConfig):
    """Configuration of the recipe of distillation."""

    model: DistillModelConfig
    train: DistillTrainConfig
