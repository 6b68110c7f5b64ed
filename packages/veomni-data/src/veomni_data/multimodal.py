"""Conversations with pictures into samples, by any transformers-like processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from .chat_template import ChatTemplate, checked_messages, content_text, mask_outside
from .collators import IGNORED_LABEL, TOKEN_KEYS, Sample
from .errors import DataError
from .pictures import load_picture
from .text import checked_sample

IMAGE_MARKER = "<image>"


def encode_multimodal_sample(
    example: Mapping[str, Any],
    *,
    processor: Any,
    template: ChatTemplate,
    max_seq_len: int,
    image_keys: str = "images",
    text_keys: str = "messages",
) -> Sample:
    """A conversation with any number of pictures, of which the assistant's turns are learnt.

    Args:
        example: a row with the columns `text_keys` (messages whose content is text with a `<image>` for each picture,
            or a list of parts `{"type": "text", "text": ...}` and `{"type": "image"}`) and `image_keys` (the pictures
            in that order, see `load_picture`; paths start from the data file's folder). Other columns are not read.
        processor: has `tokenizer` and `image_token`, and `processor(text=[str], images=[PIL, ...],
            return_tensors="pt")` gives `input_ids` [1, T], in which each image token is repeated at least once, and
            tensors for the model such as `pixel_values` [n, ...].
        template: made with the processor's tokenizer, see `get_chat_template`.
        max_seq_len: the most tokens that a sample may have.

    Returns:
        `input_ids` and `labels`, int64 [T], and the processor's other tensors as they are (without `attention_mask`).
        Image tokens are never learnt.

    Raises:
        DataError: not a conversation; more or fewer places for pictures than pictures; a picture that cannot be read;
            too long; nothing to learn; a processor that changes more of the text than the number of image tokens.
    """
    messages = checked_messages(example, text_keys)
    text, spans = template.render_with_spans(_with_placeholders(messages, template, processor.image_token))
    pictures = _load_pictures(example, image_keys, text.count(processor.image_token))
    inputs: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    if pictures:
        inputs["images"] = pictures
    if processor.tokenizer.num_special_tokens_to_add():
        inputs["add_special_tokens"] = False  # the template has written them into the text
    outputs = processor(**inputs)

    ids: list[int] = outputs["input_ids"][0].tolist()
    tokens = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = mask_outside(spans, tokens["input_ids"], tokens["offset_mapping"])
    image_id: int = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    sample: Sample = {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "labels": torch.tensor(expand_labels(tokens["input_ids"], labels, ids, image_id), dtype=torch.int64),
    }
    for key, value in outputs.items():
        if key not in ("input_ids", "attention_mask") and isinstance(value, Tensor):
            sample[key] = value[0] if key in TOKEN_KEYS else value
    return checked_sample(sample, max_seq_len)


def multimodal_prompt(
    example: Mapping[str, Any],
    *,
    image_token: str,
    template: ChatTemplate,
    image_keys: str = "images",
    text_keys: str = "messages",
) -> dict[str, Any]:
    """A conversation as the prompt of its last answer, for generation; the arguments as in `encode_multimodal_sample`.

    Returns:
        `text`, which ends where the assistant is to speak, with one `image_token` for each of `images` (PIL, RGB);
        `question`, the text of the last message before that; `answer`, the text of the last message if the assistant
        said it, else ""; and the row's other columns.

    Raises:
        DataError: as `encode_multimodal_sample`.
    """
    messages = checked_messages(example, text_keys)
    answer = content_text(messages.pop().get("content")) if messages[-1]["role"] == "assistant" else ""
    if not messages:
        raise DataError(f'"{text_keys}" has no message before the answer')
    question = content_text(messages[-1].get("content")).replace(IMAGE_MARKER, "").strip()
    text = template.render(_with_placeholders(messages, template, image_token), add_generation_prompt=True)
    pictures = _load_pictures(example, image_keys, text.count(image_token))
    rest = {key: value for key, value in example.items() if key not in (text_keys, image_keys)}
    return {**rest, "text": text, "images": pictures, "question": question, "answer": answer}


def expand_labels(ids: Sequence[int], labels: Sequence[int], expanded: Sequence[int], image_id: int) -> list[int]:
    """Labels of `expanded`, in which each `image_id` of `ids` is repeated: those of `ids`, -100 for image tokens.

    Raises:
        DataError: `expanded` is not `ids` with repeated image tokens.
    """
    result: list[int] = []
    at = 0  # in ids
    while at < len(ids) or len(result) < len(expanded):
        wanted, given = _run(ids, at, image_id), _run(expanded, len(result), image_id)
        if wanted and given >= wanted:
            result += [IGNORED_LABEL] * given
            at += wanted
        elif not wanted and not given and at < len(ids) and ids[at : at + 1] == expanded[len(result) : len(result) + 1]:
            result.append(labels[at])
            at += 1
        else:
            raise DataError(
                f"the processor's tokens differ from the text's at token {len(result)} in more than repeated image "
                f"tokens, so that the part to learn cannot be found"
            )
    return result


def _run(ids: Sequence[int], at: int, image_id: int) -> int:
    end = at
    while end < len(ids) and ids[end] == image_id:
        end += 1
    return end - at


def _load_pictures(example: Mapping[str, Any], key: str, places: int) -> list[Image]:
    """The pictures of a row, decoded; DataError if the conversation has not one of its `places` for each."""
    pictures = example.get(key)
    if not isinstance(pictures, (list, tuple)):
        pictures = [] if pictures is None else [pictures]
    if places != len(pictures):
        raise DataError(
            f'{len(pictures)} pictures in "{key}" but {places} places for them in the conversation: '
            f"it needs one {IMAGE_MARKER} or image part for each"
        )
    return [load_picture(picture, getattr(example, "folder", None)) for picture in pictures]


def _with_placeholders(
    messages: list[dict[str, Any]], template: ChatTemplate, image_token: str
) -> list[dict[str, Any]]:
    """The messages with a place for each picture: image parts if the template takes them, else the image token."""
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        if image_token != IMAGE_MARKER and image_token in content_text(content):
            raise DataError(f'message {number} has "{image_token}" in its text: write {IMAGE_MARKER} for a picture')
        parts = _split(content) if isinstance(content, str) else list(content or [])
        if template.takes_parts and any(part["type"] == "image" for part in parts):
            message["content"] = [{k: v for k, v in part.items() if k in ("type", "text")} for part in parts]
        elif content is not None:
            message["content"] = "".join(image_token if p["type"] == "image" else p["text"] for p in parts)
    return messages


def _split(content: str) -> list[dict[str, str]]:
    """Text with markers as a list of parts."""
    pieces = content.split(IMAGE_MARKER)
    parts: list[dict[str, str]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for piece in pieces[1:]:
        parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
