"""Keys that the omni and vision-language recipes add to the sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .data import DataConfig
from .recipe import RecipeConfig
from .section import Names, rule
from .train import TrainConfig


class VLDataConfig(DataConfig):
    """Data of a vision-language model, or of an omni model that writes text."""

    max_pixels: int = Field(
        default=768 * 28 * 28,
        ge=1,
        description="Pixels of a picture at most; a larger one is scaled down before it is read.",
    )
    max_pixel_size: int | None = Field(
        default=None, ge=1, description="Width and height of a picture at most, in pixels; null for no limit."
    )
    scale_factor: int | None = Field(
        default=None,
        ge=1,
        description="Pixels of which width and height become a multiple; null leaves it to the processor.",
    )
    max_image_nums: int | None = Field(
        default=None, ge=1, description="Pictures in a sample at most; null for no limit."
    )
    fps: float | None = Field(
        default=None, gt=0, description="Frames of a second of video that are read; null leaves it to the processor."
    )
    max_frames: int | None = Field(
        default=None, ge=1, description="Frames of a video at most, spread evenly; null for no limit."
    )
    max_audio_seconds: float | None = Field(
        default=None, gt=0, description="Seconds of a sound at most, the rest is cut off; null for no limit."
    )


class OmniDataConfig(VLDataConfig):
    """Data of an omni model."""

    generation_ratio: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the samples whose picture is to be generated instead of read, from 0 to 1.",
    )


class PartsTrainConfig(TrainConfig):
    """Training of a model of which some parameters learn otherwise than others."""

    freeze_params: Names = Field(
        default=(),
        description="Globs of the names of further parameters that keep their weights, such as `*.embed_tokens.*`.",
    )
    param_lrs: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="Peak learning rates of parameters by globs of their names, such as `*.merger.*: 1e-3`; of those "
        "that match the last one counts, before `train.vit_lr`.",
    )

    @rule("lr", "vit_lr", "param_lrs")
    def _peaks_share_a_schedule(self) -> str | None:
        if self.lr == 0 and (self.vit_lr or any(self.param_lrs.values())):
            return "other learning rates follow the schedule of train.lr in proportion: set train.lr above 0"
        return None


class OmniTrainConfig(PartsTrainConfig):
    """Training of an omni model."""

    freeze_encoder: bool = Field(
        default=False, description="Whether the encoders keep their weights and their projectors learn."
    )
    freeze_encoder_all: bool = Field(
        default=False, description="Whether the encoders and their projectors keep their weights."
    )
    freeze_decoder: bool = Field(default=False, description="Whether the decoders keep their weights.")
    freeze_foundation: bool = Field(default=False, description="Whether the foundation model keeps its weights.")
    save_initial_model: bool = Field(
        default=False, description="Whether the model is exported before the first step, as a Hugging Face folder."
    )


class OmniRecipeConfig(RecipeConfig):
    """Configuration of the omni recipe."""

    data: OmniDataConfig
    train: OmniTrainConfig


class VLTrainConfig(PartsTrainConfig):
    """Training of a vision-language model, or of an omni model that writes text."""

    freeze_vit: bool = Field(
        default=False,
        description="Whether the vision encoder keeps its weights, what makes tokens of its features included.",
    )
    freeze_audio_tower: bool = Field(
        default=False, description="Whether the encoder of sounds, if the model has one, keeps its weights."
    )


class VLRecipeConfig(RecipeConfig):
    """Configuration of the vision-language recipe."""

    data: VLDataConfig
    train: VLTrainConfig
