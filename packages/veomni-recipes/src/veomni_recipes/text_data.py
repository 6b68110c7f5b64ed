"""What a configuration says about turning texts and conversations into samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from veomni_config import ConfigError, DataConfig, ModelConfig, Problem, RecipeConfig
from veomni_data import (
    DataDescription,
    Sample,
    get_chat_template,
    process_preference_example,
    process_pretrain_example,
    process_sft_example,
)
from veomni_models import build_tokenizer


def open_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer that the configuration names.

    Raises:
        ConfigError: it names none.
        ModelError: there is none in the folder.
    """
    if model.tokenizer_path is None:
        text = "there is no folder to take it from: set it, model.config_path or model.model_path"
        raise ConfigError([Problem("model.tokenizer_path", text)])
    return build_tokenizer(model.tokenizer_path)


def text_transform(data: DataConfig, tokenizer: Any) -> Callable[[Mapping[str, Any]], list[Sample] | Sample]:
    """Row -> samples, by `data.data_type`. The tokenizer gets the chat template, to be exported with the model.

    Raises:
        ConfigError: a kind of data that is not text.
    """
    columns = data.columns or None
    if data.data_type == "plaintext":
        return partial(
            process_pretrain_example,
            tokenizer=tokenizer,
            max_seq_len=data.max_seq_len,
            text_keys=data.text_keys,
            columns=columns,
        )
    if data.data_type not in ("conversation", "preference"):
        text = f"{data.data_type} is not text: plaintext, conversation or preference"
        raise ConfigError([Problem("data.data_type", text)])
    template = get_chat_template(data.chat_template, tokenizer)
    tokenizer.chat_template = template.source
    if data.data_type == "preference":
        encode = partial(process_sft_example, tokenizer=tokenizer, template=template)
        return partial(process_preference_example, encode=encode, columns=columns)
    keys = data.text_keys or "messages"
    return partial(process_sft_example, tokenizer=tokenizer, template=template, text_keys=keys, columns=columns)


def describe_text(cfg: RecipeConfig, tokenizer: Path, pad_token_id: int) -> dict[str, Any]:
    """How the data become batches, for `veomni-data replay`, which reads it in the ledger.

    Args:
        tokenizer: the folder in which the model's tokenizer is saved.
    """
    packed = cfg.train.rmpad or cfg.train.rmpad_with_pos_ids
    return DataDescription(
        path=cfg.data.train_path,
        type=cfg.data.data_type,
        tokenizer=str(tokenizer),
        chat_template=cfg.data.chat_template,
        max_seq_len=cfg.data.max_seq_len if cfg.data.data_type == "plaintext" else None,
        kind=cfg.data.datasets_type,
        root=cfg.data.root,
        columns=cfg.data.columns or None,
        text_keys=cfg.data.text_keys,
        shuffle_buffer=cfg.data.shuffle_buffer,
        collator="packing" if packed else "padding",
        pad_token_id=pad_token_id,
    ).to_dict()
