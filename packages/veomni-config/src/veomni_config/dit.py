"""Keys that the recipe of diffusion transformers adds to the sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .data import DataConfig
from .model import ModelConfig
from .recipe import RecipeConfig
from .section import AnyKeys, rule
from .train import TrainConfig


class DitModelConfig(ModelConfig):
    """Which diffusion transformer is trained; `model.model_path` is the folder of a diffusers pipeline."""

    transformer: AnyKeys = Field(
        default={},
        description="Keys that are set in the transformer's configuration; with `_class_name` (such as "
        "`FluxTransformer2DModel`) and without `model.model_path` it is built from these keys alone.",
    )
    scheduler: AnyKeys = Field(
        default={},
        description="Keys that are set in the noise scheduler's configuration, which says what the transformer learns "
        "to predict; `_class_name` names another scheduler of diffusers.",
    )
    labels: tuple[str, ...] = Field(
        default=(),
        description="Names of the classes, by which a transformer that is trained on classes is asked; with "
        "`model.model_path` those of the pipeline.",
    )
    embedded_guidance: float = Field(
        default=1.0, ge=0, description="Guidance scale that a guidance-distilled transformer is told while it learns."
    )


class DitDataConfig(DataConfig):
    """Pictures or videos with prompts, encoded in advance by `prepare_dit`."""

    data_type: Literal["diffusion"] = Field(
        default="diffusion", description="Kind of a sample: latents of a picture or video, and its encoded prompt."
    )
    raw_path: str | None = Field(
        default=None,
        description="What `prepare_dit` encodes into `data.train_path`: lines with a prompt (or a class's name) and "
        "a picture or video.",
    )
    eval_raw_path: str | None = Field(
        default=None,
        description="What `prepare_dit` encodes into `data.eval_path`: lines with a prompt, which is drawn, and for "
        "validations a picture or video.",
    )
    image_keys: str = Field(
        default="image", min_length=1, description="Field of a line that holds its picture; `video` one that moves."
    )
    resolution: int = Field(
        default=1024,
        ge=1,
        description="Pictures are scaled to about the area of a square of so many pixels a side; smaller ones stay.",
    )
    bucket_step: int = Field(
        default=64,
        ge=1,
        description="Width and height become multiples of so many pixels, so that many pictures have one size.",
    )
    num_frames: int = Field(default=1, ge=1, description="Frames that are taken of a video; shorter ones are refused.")
    fps: float = Field(default=16.0, gt=0, description="Frames of a second of video that are taken.")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="Tokens that a prompt is cut or padded to; null leaves it to the pipeline."
    )

    def derive(self) -> dict[str, Any]:
        """The field of the prompt."""
        return super().derive() | {"text_keys": self.text_keys or "prompt"}


class DitTrainConfig(TrainConfig):
    """Training of a diffusion transformer."""

    timestep_sampling: Literal["uniform", "logit_normal"] = Field(
        default="logit_normal", description="How times between picture and noise are drawn."
    )
    logit_mean: float = Field(
        default=0.0, description="Mean of the logit of times, for `logit_normal`; above 0 there is more noise."
    )
    logit_std: float = Field(default=1.0, gt=0, description="Standard deviation of the logit of times.")
    timestep_shift: float | None = Field(
        default=None,
        gt=0,
        description="Shift of times towards noise, for flow matching; null takes the scheduler's, which may follow the "
        "size of the picture.",
    )
    condition_dropout: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of the samples, from 0 to 1, that are learnt without their prompt, which classifier-free "
        "guidance needs.",
    )
    sample_steps: int = Field(
        default=0, ge=0, description="Steps between two drawings of `data.eval_path`; 0 draws at the end only."
    )
    sample_count: int = Field(default=16, ge=1, description="Prompts that are drawn during training.")
    num_inference_steps: int = Field(default=28, ge=1, description="Denoising steps of a drawing.")
    guidance_scale: float = Field(
        default=4.0, ge=0, description="Classifier-free guidance of drawings; 1 is without guidance."
    )

    @rule("dyn_bsz", "micro_batch_size")
    def _a_row_is_a_batch(self) -> str | None:
        if self.dyn_bsz and self.micro_batch_size > 1:
            return (
                "a row is filled with pictures of one size, and is a batch of its own: set micro_batch_size to 1 and "
                "data.max_seq_len to the latent tokens of a batch"
            )
        return None

    @rule("eval_answers")
    def _drawings_instead_of_answers(self) -> str | None:
        if self.eval_answers:
            return "a diffusion transformer draws and does not answer: set sample_steps instead"
        return None

    @rule("rmpad_with_pos_ids")
    def _pictures_are_stacked(self) -> str | None:
        if self.rmpad_with_pos_ids:
            return "pictures of one size are stacked, not packed behind each other: leave rmpad_with_pos_ids out"
        return None


class DitRecipeConfig(RecipeConfig):
    """Configuration of the recipe of diffusion transformers."""

    model: DitModelConfig
    data: DitDataConfig
    train: DitTrainConfig

    @rule("model.model_path", "model.transformer")
    def _export_needs_a_configuration(self) -> str | None:
        if not self.model.model_path and not self.model.transformer.get("_class_name"):
            return (
                "nothing says which transformer: set model.model_path to the folder of a diffusers pipeline, or "
                "model.transformer with its _class_name"
            )
        return None

    @rule("train.init_device", "model.model_path")
    def _meta_needs_weights(self) -> str | None:
        if self.train.init_device == "meta" and not self.model.model_path:
            return "weights that are drawn are drawn on a device: set train.init_device to cpu, or model.model_path"
        return None

    @rule("train.train_architecture", "model.model_path")
    def _adapters_need_weights(self) -> str | None:
        if self.train.train_architecture == "lora" and not self.model.model_path:
            return "adapters are trained beside weights that are there: set model.model_path to a pipeline's folder"
        return None

    @rule("data.too_long", "data.drop_last")
    def _pictures_are_whole(self) -> str | None:
        if self.data.too_long != "drop":
            return "a picture cannot be cut: leave data.too_long at drop, and data.max_seq_len above its latent tokens"
        if not self.data.drop_last:
            return "every rank needs pictures in every step: leave data.drop_last at true"
        return None
