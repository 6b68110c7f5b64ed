"""The `infer` and `evaluate` sections: how a trained model answers, and what it is measured on."""

from __future__ import annotations

from typing import Any, Literal

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
    prompt: str | None = Field(
        default=None, description="What is asked; with neither this nor `infer.prompts_path` there is a conversation."
    )
    files: tuple[str, ...] = Field(
        default=(), description="Pictures, videos and sounds that `infer.prompt` is about, in this order."
    )
    prompts_path: str | None = Field(
        default=None,
        description="File of prompts: lines of JSON with `prompt` or `messages` (and `images`, `videos`, `audios`), or "
        "of text.",
    )
    output_path: str | None = Field(
        default=None, description="File for the answers, a JSON object a line; null prints them."
    )
    drawings_path: str = Field(
        default="drawings", min_length=1, description="Folder for pictures and videos that are drawn."
    )
    chat: bool = Field(
        default=True, description="Whether a prompt is a message that is answered; else a text that is continued."
    )
    batch_size: int = Field(default=16, ge=1, description="Prompts that are answered together.")

    def derive(self) -> dict[str, Any]:
        """The tokenizer lies beside the weights."""
        return {"tokenizer_path": self.tokenizer_path or self.model_path}

    @rule("prompt", "prompts_path")
    def _one_source_of_prompts(self) -> str | None:
        if self.prompt is not None and self.prompts_path is not None:
            return "a prompt is given, and a file of prompts: leave one of them out"
        return None

    @rule("output_path", "prompt", "prompts_path")
    def _a_conversation_is_not_written(self) -> str | None:
        if self.output_path is not None and self.prompt is None and self.prompts_path is None:
            return "a conversation is not written to a file: set prompts_path to a file of prompts, or this to null"
        return None

    @rule("temperature", "do_sample")
    def _no_sampling_at_zero(self) -> str | None:
        if self.do_sample and self.temperature == 0:
            return "nothing can be drawn at temperature 0: set do_sample to false, or temperature to 0.7"
        return None


class EvaluateConfig(Section):
    """Which model is measured on which held-out data."""

    model_path: str = Field(min_length=1, description="Folder of the weights, such as `hf_ckpt` of a run.")
    tokenizer_path: str | None = Field(
        default=None, description="Folder of the tokenizer or processor; falls back to `evaluate.model_path`."
    )
    data_path: str = Field(min_length=1, description="Held-out data, as `data.train_path` names training data.")
    data_type: Literal["plaintext", "conversation"] = Field(
        default="conversation",
        description="`plaintext` is measured by loss, perplexity and bits per byte, `conversation` by the share of "
        "right last answers, of each `task` if the data have such a column.",
    )
    text_keys: str | None = Field(
        default=None,
        description="Field of a sample that holds its text; null is `messages` for conversations, and for plaintext "
        "the first of `text`, `content_split` and `content`.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our names of a sample's fields to those of the data, for conversations."
    )
    root: str | None = Field(
        default=None, description="Folder that the paths in the data may not leave; null for no such limit."
    )
    chat_template: str = Field(
        default="default", min_length=1, description="Name of the chat template that renders conversations."
    )
    max_seq_len: int = Field(
        default=2048,
        ge=2,
        description="Tokens that the model sees at once; a longer text is read in windows that overlap by half.",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Tokens of an answer at most; null is 8 more than the longest right one."
    )
    batch_size: int = Field(default=16, ge=1, description="Texts or questions that are computed together.")
    output_dir: str = Field(
        min_length=1, description="Folder for `scores.json` and `predictions.jsonl`, a line for each text or question."
    )

    def derive(self) -> dict[str, Any]:
        """The tokenizer lies beside the weights."""
        return {"tokenizer_path": self.tokenizer_path or self.model_path}
