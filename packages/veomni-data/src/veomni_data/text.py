"""Transforms of text: rows of a data file into samples of `input_ids` and `labels`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .chat_template import ChatTemplate, content_text
from .collators import IGNORED_LABEL, Sample
from .errors import DataError
from .layouts import Message, normalize_example

TEXT_COLUMNS = ("text", "content_split", "content")


def process_pretrain_example(
    example: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_seq_len: int | None = None,
    text_keys: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Sample]:
    """Plain text: its tokens and the tokenizer's end-of-sequence token, cut into samples of at most `max_seq_len`.

    Every token is a target, but the first of a sample, which nothing stands before. Nothing is cut off.

    Args:
        example: a row with a text, or a list of texts of which each ends with the end-of-sequence token.
        tokenizer: any transformers tokenizer.
        max_seq_len: the most tokens that a sample may have; None leaves each text whole.
        text_keys: the column of the text; None is the first that there is of `TEXT_COLUMNS`.
        columns: the same as {"text": column}.

    Returns:
        Samples of `input_ids` and `labels`, int64 [T]; a text without a token gives none.

    Raises:
        DataError: the row has no text in the column ("bad row").
    """
    key = text_keys or (columns or {}).get("text")
    if key is None:
        key = next((name for name in TEXT_COLUMNS if example.get(name) is not None), TEXT_COLUMNS[0])
    texts = example.get(key)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f'there is no text in the column "{key}"; the columns are {sorted(map(str, example))}', reason="bad row"
        )
    samples: list[Sample] = []
    end = tokenizer.eos_token_id
    for text in texts:
        ids = _token_ids(tokenizer, text)
        if not ids or not text:
            continue
        if end is not None and ids[-1] != end:
            ids.append(end)
        whole = torch.from_numpy(np.array(ids, dtype=np.int64))  # a third of the time of torch.tensor(ids)
        for piece in whole.split(max_seq_len) if max_seq_len and len(ids) > max_seq_len else (whole,):
            samples.append({"input_ids": piece, "labels": piece.clone()})
    return samples


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """`tokenizer(text)["input_ids"]`; a usual fast tokenizer is not asked for offsets, a third of its time."""
    usual = getattr(type(tokenizer), "_encode_plus", None)
    if getattr(usual, "__module__", None) == "transformers.tokenization_utils_tokenizers":
        backend = tokenizer.backend_tokenizer
        if backend.truncation is None and backend.padding is None:
            return list(backend.encode_batch_fast([text])[0].ids)
    return list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])


def process_sft_example(
    example: Mapping[str, Any],
    tokenizer: Any,
    template: ChatTemplate,
    *,
    max_seq_len: int | None = None,
    text_keys: str = "messages",
    columns: Mapping[str, str] | None = None,
) -> Sample:
    """A conversation, of which the assistant's turns (with their end-of-turn tokens) are learnt.

    Args:
        example: a row in any layout of `normalize_example`; its `tools` are shown to the template. A message with
            `"weight": 0` is not learnt.
        tokenizer: the one that `template` was made with.
        template: how the conversation becomes text, see `get_chat_template`.
        max_seq_len: the most tokens that a sample may have; None is no limit.
        text_keys: the column of the conversation, if it has another name than the layouts know.
        columns: our names of columns to the row's, for any other layout, see `normalize_example`.

    Returns:
        `input_ids` and `labels`, int64 [T]; -100 where nothing is learnt.

    Raises:
        DataError: not a conversation ("bad row"); pictures in it; "no answer"; "nothing to learn"; "too long"; or what
            `ChatTemplate.render_with_spans` raises.
    """
    if tokenizer is not template.tokenizer:
        raise ValueError("the chat template was made for another tokenizer: get_chat_template(name, tokenizer)")
    row = normalize_example(example, conversation_columns(text_keys, columns))
    for number, message in enumerate(row.get("messages", ()), 1):
        if isinstance(message["content"], list) and any(part["type"] != "text" for part in message["content"]):
            raise DataError(f"message {number} has pictures, video or sound: use encode_multimodal_sample with it")
    ids, labels = template.encode(checked_answers(row), tools=row.get("tools"))
    sample = {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
    return checked_sample(sample, max_seq_len)


def conversation_columns(text_keys: str, columns: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The columns with the name of the conversation's, if it has one of its own."""
    return columns if text_keys == "messages" else {"messages": text_keys, **(columns or {})}


def checked_answers(row: Mapping[str, Any]) -> list[Message]:
    """The conversation of a normalized row; DataError ("no answer") if the assistant says nothing in it."""
    if "messages" not in row:
        raise DataError(
            "the row is a preference (chosen and rejected): use process_preference_example", reason="bad row"
        )
    messages: list[Message] = row["messages"]
    for message in messages:
        if message["role"] == "assistant" and (message.get("tool_calls") or _says(message["content"])):
            return messages
    raise DataError("there is no answer: no message of the assistant says anything", reason="no answer")


def checked_sample(sample: Sample, max_seq_len: int | None) -> Sample:
    """The sample itself; DataError if it is longer than `max_seq_len` or nothing of it is learnt."""
    length = len(sample["input_ids"])
    if max_seq_len is not None and length > max_seq_len:
        raise DataError(f"the sample has {length} tokens, more than max_seq_len={max_seq_len}", reason="too long")
    if not (sample["labels"].numpy()[1:] != IGNORED_LABEL).any():
        raise DataError(
            "there is nothing to learn: no token of the sample belongs to an assistant turn", reason="nothing to learn"
        )
    return sample


def _says(content: Any) -> bool:
    if isinstance(content, list) and any(part["type"] != "text" for part in content):
        return True  # a picture may be the answer
    return bool(content_text(content).strip())
