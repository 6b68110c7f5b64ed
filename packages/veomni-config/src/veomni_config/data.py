"""The `data` section: what is read, and how it becomes rows of tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .section import Section, rule

_TEXT_KEYS = {"plaintext": "content_split", "conversation": "messages"}


def _a_length(value: Any) -> Any:
    if value is None:
        raise ValueError(
            "nothing given; packing (train.rmpad, train.rmpad_with_pos_ids) and train.dyn_bsz fill rows of this "
            "length; allowed: whole number >= 1"
        )
    return value


class DataConfig(Section):
    """What is read, and how it becomes rows of tokens."""

    train_path: str = Field(
        min_length=1,
        description="Training data: a file, folder, glob, comma-separated list of these, hub id, or a multisource "
        "`.yaml` file.",
    )
    eval_path: str | None = Field(
        default=None,
        description="Held-out data for validations, and for an evaluation by generation at the end; null for none.",
    )
    train_size: int = Field(
        default=10_000_000, ge=1, description="Tokens an epoch, from which the steps follow when `train.dyn_bsz` is on."
    )
    data_type: Literal["plaintext", "conversation", "preference", "diffusion"] = Field(
        default="conversation", description="Kind of a sample, which chooses how it becomes tokens."
    )
    dataloader_type: Literal["native"] = Field(default="native", description="Which data loader is used.")
    datasets_type: Literal["mapping", "iterable"] = Field(
        default="mapping", description="`mapping` has a length and random access, `iterable` streams."
    )
    multisource_datasets_type: Literal["interleave"] = Field(
        default="interleave", description="How the sources of a multisource file are mixed."
    )
    enable_multisource: bool = Field(
        default=False,
        description="Whether `data.train_path` is a multisource file; follows from its name, `.yaml` or `.yml`.",
    )
    source_name: str | None = Field(default=None, description="Label of a single source, for metrics.")
    data_tag: Literal["default", "mmtag"] = Field(
        default="default",
        json_schema_extra={"legacy": "the layout of a sample is recognised by its fields"},
        description="Layout of multimodal samples.",
    )
    drop_resume_buffer: bool = Field(
        default=False,
        json_schema_extra={"legacy": "samples that wait are read again when a run resumes, none is lost"},
        description="Whether samples that wait in the packing buffer are dropped when a run resumes.",
    )
    text_keys: str | None = Field(
        default=None,
        description="Field of a sample that holds its text; null is `content_split` for plaintext and `messages` for "
        "conversation.",
    )
    image_keys: str = Field(default="images", min_length=1, description="Field of a sample that holds its pictures.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our names of a sample's fields (`messages`, `prompt`, `images`, ...) to those of the data, for a "
        "layout that is not recognised by itself.",
    )
    root: str | None = Field(
        default=None,
        description="Folder that the paths in the data may not leave; null for no such limit.",
    )
    max_skipped: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of broken samples, from 0 to 1, over which the run stops; up to it they are skipped, "
        "counted and named in `skipped.jsonl`.",
    )
    too_long: Literal["drop", "truncate", "split"] = Field(
        default="drop", description="What becomes of a sample that is longer than `data.max_seq_len`; it is counted."
    )
    shuffle_buffer: int = Field(
        default=1000, ge=1, description="Samples of each stream that are shuffled together; for `iterable` data."
    )
    chat_template: str = Field(
        default="default", min_length=1, description="Name of the chat template that renders conversations."
    )
    max_seq_len: Annotated[int, BeforeValidator(_a_length)] = Field(
        default=2048, ge=1, description="Tokens in a row at most."
    )
    num_workers: int = Field(
        default=2, ge=0, description="Worker processes of the loader on each rank; 0 loads in the main one."
    )
    prefetch_factor: int = Field(
        default=2, ge=1, description="Batches that each worker makes in advance; unused with `data.num_workers: 0`."
    )
    drop_last: bool = Field(default=True, description="Whether the last incomplete step of an epoch is dropped.")
    pin_memory: bool = Field(
        default=True, description="Whether batches are put into page-locked memory for faster copies."
    )
    shuffle_shard_nums: int = Field(
        default=1,
        ge=1,
        json_schema_extra={"legacy": "samples are shuffled over all files"},
        description="Shards that are shuffled together.",
    )
    split_nums: int = Field(
        default=1,
        ge=1,
        json_schema_extra={"legacy": "files are split over ranks by the loader itself"},
        description="Parts that a file is split into.",
    )
    predownload_factor: float = Field(
        default=0.5,
        ge=0,
        json_schema_extra={"legacy": "nothing is downloaded ahead, data are read where they lie"},
        description="Share of the data that is downloaded ahead, from 0 to 1.",
    )
    silent_exception: bool = Field(
        default=False,
        json_schema_extra={"legacy": "a sample that cannot be read is never passed over in silence"},
        description="Whether errors of single samples are hidden.",
    )

    def derive(self) -> dict[str, Any]:
        """The field of the text by the kind of data, and whether there are several sources."""
        derived: dict[str, Any] = {"text_keys": self.text_keys or _TEXT_KEYS.get(self.data_type)}
        if "enable_multisource" not in self.model_fields_set:
            derived["enable_multisource"] = self._is_multisource()
        return derived

    def _is_multisource(self) -> bool:
        return str(self.train_path).endswith((".yaml", ".yml"))

    @rule("enable_multisource", "train_path")
    def _multisource_is_a_yaml_file(self) -> str | None:
        if self.enable_multisource == self._is_multisource():
            return None
        if self.enable_multisource:
            return "several sources are described by a .yaml file: leave enable_multisource out, or name such a file"
        return "a .yaml file describes several sources: leave enable_multisource out"
