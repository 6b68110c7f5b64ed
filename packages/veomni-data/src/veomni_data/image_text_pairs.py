"""Pairs of a picture and what is said about it, turned around: what was said is the wish, and the picture is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from .chat_template import content_text
from .layouts import Message
from .placeholders import MARKERS, without_markers


def drawn_instead(messages: Sequence[Message], pictures: Sequence[Any], ratio: float) -> list[Message]:
    """A conversation about one picture, or in `ratio` of the cases one in which that picture is drawn.

    Turned around are conversations of one question and one answer with a single picture, which the question shows: the
    answer becomes the wish, and the picture the answer. Whether, depends on the conversation and its picture alone: it
    is the same in each epoch, after a restart, and on any number of ranks.

    Args:
        messages: see `normalize_example`.
        pictures: those of the row's column.
        ratio: from 0 to 1.
    """
    turns = [message for message in messages if message["role"] not in ("system", "developer")]
    if [message["role"] for message in turns] != ["user", "assistant"]:
        return list(messages)
    question, answer = turns
    held = [part for part in _parts(question) if part["type"] != "text"]
    markers = {kind: content_text(question["content"]).count(marker) for kind, marker in MARKERS.items()}
    shown = len([part for part in held if part["type"] == "image"]) + markers["image"]
    others = len([part for part in held if part["type"] != "image"]) + markers["video"] + markers["audio"]
    said = content_text(answer["content"])
    plain = said.strip() and without_markers(said) == said.strip() and not answer.get("tool_calls")
    if shown != 1 or others or not plain or any(part["type"] != "text" for part in _parts(answer)):
        return list(messages)
    picture = held[0] if held else {"type": "image"}
    if _share(said, question, picture.get("value", next(iter(pictures), None))) >= ratio:
        return list(messages)
    drawn = {key: value for key, value in picture.items() if key != "generation"}
    return [
        *(message for message in messages if message["role"] in ("system", "developer")),
        {"role": "user", "content": said},
        {"role": "assistant", "content": [drawn]},
    ]


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else []


def _share(said: str, question: Message, picture: Any) -> float:
    """A number from 0 to 1, evenly spread over pairs."""
    content = hashlib.blake2b(digest_size=8)
    for each in (said, content_text(question["content"]), picture):
        for value in [each.get("path"), each.get("bytes")] if isinstance(each, dict) else [each]:
            content.update(value if isinstance(value, bytes) else _bytes(value))
    return int.from_bytes(content.digest(), "big") / 2**64


def _bytes(value: Any) -> bytes:
    return value.tobytes() if hasattr(value, "tobytes") else str(value).encode()
