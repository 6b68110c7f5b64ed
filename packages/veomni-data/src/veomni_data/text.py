"""Transforms of text: rows of a data file into samples of `input_ids` and `labels`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .chat_template import ChatTemplate, checked_messages, content_text
from .collators import IGNORED_LABEL, Sample
from .errors import DataError


def process_pretrain_example(
    example: Mapping[str, Any], tokenizer: Any, *, max_seq_len: int, text_keys: str = "text"
) -> list[Sample]:
    """Plain text: its tokens and the tokenizer's end-of-sequence token, cut into samples of at most `max_seq_len`.

    Every token is a target, but the first of a sample, which nothing stands before. Nothing is cut off.

    Returns:
        Samples of `input_ids` and `labels`, int64 [T]; a text without a token gives none.

    Raises:
        DataError: the row has no text in the column `text_keys`.
    """
    if not isinstance(example.get(text_keys), str):
        raise DataError(f'there is no text in the column "{text_keys}"; the columns are {sorted(example)}')
    ids = tokenizer(example[text_keys])["input_ids"]
    if ids and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    pieces = torch.tensor(ids, dtype=torch.int64).split(max_seq_len) if ids else ()
    return [{"input_ids": piece, "labels": piece.clone()} for piece in pieces]


def process_sft_example(
    example: Mapping[str, Any],
    tokenizer: Any,
    template: ChatTemplate,
    *,
    max_seq_len: int,
    text_keys: str = "messages",
) -> Sample:
    """A conversation, of which the assistant's turns (with their end-of-turn tokens) are learnt.

    Args:
        example: a row with the column `text_keys`: messages `{"role": ..., "content": text or a list of text parts}`.
        tokenizer: the one that `template` was made with.
        template: how the conversation becomes text, see `get_chat_template`.
        max_seq_len: the most tokens that a sample may have.

    Returns:
        `input_ids` and `labels`, int64 [T]; -100 where nothing is learnt.

    Raises:
        DataError: not a conversation, one with pictures, too long, or one without anything to learn.
    """
    if tokenizer is not template.tokenizer:
        raise ValueError("the chat template was made for another tokenizer: get_chat_template(name, tokenizer)")
    messages = checked_messages(example, text_keys)
    for message in messages:
        if isinstance(message.get("content"), list):
            if any(part["type"] != "text" for part in message["content"]):
                raise DataError("the conversation has pictures: use encode_multimodal_sample")
            message["content"] = content_text(message["content"])
    ids, labels = template.encode(messages)
    return checked_sample({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}, max_seq_len)


def checked_sample(sample: Sample, max_seq_len: int) -> Sample:
    """The sample itself; DataError if it is longer than `max_seq_len` or nothing of it is learnt."""
    if len(sample["input_ids"]) > max_seq_len:
        raise DataError(f"the sample has {len(sample['input_ids'])} tokens, more than max_seq_len={max_seq_len}")
    if (sample["labels"][1:] == IGNORED_LABEL).all():
        raise DataError("there is nothing to learn: no token of the sample belongs to an assistant turn")
    return sample
