"""Preferences into samples: a chosen and a rejected answer that never part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

import torch

from .collators import IGNORED_LABEL, TOKEN_KEYS, Sample
from .errors import DataError
from .layouts import Message, normalize_example
from .row import Row


def process_preference_example(
    example: Mapping[str, Any],
    encode: Callable[[Mapping[str, Any]], Sample],
    *,
    max_seq_len: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Sample:
    """A preference as one sample that is a row of two: first the chosen, then the rejected conversation.

    As one sample, no packing, shuffling or dealing to ranks can part them. Collated, the two are segments of their own:
    `cu_seq_lens_q[2 * k : 2 * k + 3]` bounds those of pair k, and `preference[2 * k : 2 * k + 2]` is [1, 0].

    What both begin with is not learnt: the loss is of what the answers differ in.

    Args:
        example: a row with chosen and rejected answers, see `normalize_example`.
        encode: the transform of a conversation, such as `partial(process_sft_example, tokenizer=..., template=...)` or
            `partial(encode_multimodal_sample, ...)`, without `max_seq_len`; called with `messages`.
        max_seq_len: the most tokens that the two may have together; None is no limit.
        columns: our names of columns to the row's, see `normalize_example`.

    Returns:
        What `encode` gives for the two, joined; `seq_lens`, their lengths; and `preference`, int64 [2] = [1, 0].

    Raises:
        DataError: not a preference ("bad row"); the answers are the same ("nothing to learn"); "too long"; or what
            `encode` raises.
    """
    row = normalize_example(example, columns)
    if "chosen" not in row or "rejected" not in row:
        raise DataError(
            f'there is no preference ("chosen" and "rejected") in the columns {sorted(example)}', reason="bad row"
        )
    chosen, rejected = row.pop("chosen"), row.pop("rejected")
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if same == len(chosen) or same == len(rejected):
        raise DataError("the chosen answer and the rejected one are the same", reason="nothing to learn")
    samples = [encode(_as_row(row, example, _unlearnt(messages, same))) for messages in (chosen, rejected)]
    lengths = [len(sample["input_ids"]) for sample in samples]
    if max_seq_len is not None and sum(lengths) > max_seq_len:
        raise DataError(
            f"the two answers have {lengths[0]} + {lengths[1]} tokens, more than max_seq_len={max_seq_len}",
            reason="too long",
        )
    # the first token of a row has nothing before it, and so has that of the second conversation
    samples[1]["labels"][:1] = IGNORED_LABEL
    return {**_joined(*samples), "seq_lens": lengths, "preference": torch.tensor([1, 0])}


def _unlearnt(messages: list[Message], count: int) -> list[Message]:
    """The messages, of which the first `count` are not learnt."""
    return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:count]] + messages[count:]


def _as_row(row: dict[str, Any], example: Mapping[str, Any], messages: list[Message]) -> Mapping[str, Any]:
    rest = {key: value for key, value in row.items() if key not in ("prompt", "conversations", "conversation")}
    values = {**rest, "messages": messages}
    if isinstance(example, Row):
        return Row(values, example.place, example.folder, example.source, example.root)
    return values


def _joined(first: Sample, second: Sample) -> Sample:
    if set(first) != set(second):
        odd = sorted(set(first) ^ set(second))
        raise DataError(f"of the chosen and the rejected conversation only one has {odd[0]}")
    joined = {}
    for key, value in first.items():
        along = -1 if key in TOKEN_KEYS or key == "position_ids" else 0
        try:
            joined[key] = torch.cat([value, second[key]], dim=along)
        except RuntimeError as error:
            shapes = f"{list(value.shape)} and {list(second[key].shape)}"
            raise DataError(f'"{key}" of the two conversations cannot be joined: {shapes}') from error
    return joined
