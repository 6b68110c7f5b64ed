"""The `model` section: which model, from where, and with which kernels."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from .section import AnyKeys, Names, Section

Parts: TypeAlias = dict[str, Any]
ReadParts: TypeAlias = dict[Literal["image", "video", "audio"], Parts]
MadeParts: TypeAlias = dict[Literal["image"], Parts]
Encoders: TypeAlias = Annotated[
    ReadParts,
    BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=ReadParts | None),
]
Decoders: TypeAlias = Annotated[
    MadeParts,
    BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=MadeParts | None),
]


class ModelConfig(Section):
    """Which model is trained, and from what it starts."""

    config_path: str | None = Field(
        default=None, description="Folder (or hub id) of the model's configuration; falls back to `model.model_path`."
    )
    model_path: str | None = Field(
        default=None, description="Folder (or hub id) of pretrained weights; null starts from random values."
    )
    tokenizer_path: str | None = Field(
        default=None, description="Folder (or hub id) of the tokenizer or processor; falls back to `model.config_path`."
    )
    foundation: AnyKeys = Field(
        default={},
        description="Keys that are set in the foundation model's configuration; with `model_type` among them the model "
        "is built from these keys alone.",
    )
    encoders: Encoders = Field(
        default={},
        description="Encoder of each modality that is read: its configuration keys, or `config_path` and "
        "`model_path`, and `projector`.",
    )
    decoders: Decoders = Field(
        default={},
        description="Decoder of each modality that is generated: its configuration keys, or `config_path` and "
        "`model_path`.",
    )
    input_encoder: Literal["encoder", "decoder"] = Field(
        default="encoder", description="Which module turns pictures that are read into features."
    )
    output_encoder: Literal["encoder", "decoder"] = Field(
        default="decoder", description="Which module turns pictures that are to be generated into targets."
    )
    encode_target: bool = Field(
        default=False, description="Whether the decoder also encodes the picture that is to be generated."
    )
    attn_implementation: str | None = Field(
        default="auto",
        description="Attention kernel: `auto` takes the best one for the device and packed rows; else any name that is "
        "registered in transformers (`eager`, `sdpa`, `flash_attention_2`, ...); null leaves it to the model.",
    )
    moe_implementation: Literal["auto", "eager", "fused"] | None = Field(
        default=None,
        description="Experts kernel: `eager` loops over experts, `fused` is one grouped matrix product; `auto` "
        "and null take the best one for the device.",
    )
    lora_config: AnyKeys = Field(
        default={},
        description="Options of `peft.LoraConfig` (`r`, `lora_alpha`, `target_modules`, ...) for "
        "`train.train_architecture: lora`.",
    )
    quantize_frozen: Literal[8, 4] | None = Field(
        default=None,
        description="Bits of the frozen linear layers under adapters that learn (QLoRA, by torchao): 8 are integers, 4 "
        "are NF4; null leaves them as they are. Adapters are exported as without it, and the merged model with weights "
        "that were never rounded.",
    )
    basic_modules: Names = Field(
        default=(), description="Class names of further modules that FSDP shards as units of their own."
    )

    def derive(self) -> dict[str, Any]:
        """The fall-backs from one path to the other."""
        config_path = self.config_path or self.model_path
        return {"config_path": config_path, "tokenizer_path": self.tokenizer_path or config_path}
