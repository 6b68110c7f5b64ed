"""Where in a conversation pictures, videos and sounds stand: parts and markers into a model's placeholder tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .chat_template import ChatTemplate, content_text
from .errors import DataError
from .layouts import Message

KINDS = ("image", "video", "audio")
MARKERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
"""What stands in a text for the next of a kind."""

_MARKER = re.compile("|".join(f"({re.escape(marker)})" for marker in MARKERS.values()))
_WORDS = {"image": "pictures", "video": "videos", "audio": "sounds"}
_ONE = {"image": "a picture", "video": "a video", "audio": "a sound"}


@dataclass(frozen=True)
class Generation:
    """How pictures that a model is to draw become part of a sample, apart from those that it reads.

    Such a picture is an image part or marker of an assistant's turn, or an image part with `"generation": true`; with
    `"generation": false` it is read wherever it stands. In the text it becomes `begin`, `tokens` times `token`, and
    `end`; its pixels are made by `image_processor` and come into a key of their own, `target_pixel_values`, in the
    order of the conversation. What the model makes of them (codes of a tokenizer, a target for a flow) is its own.

    Attributes:
        image_processor: called with `images=[PIL], return_tensors="pt"`; gives "pixel_values" [n, C, H, W].
        token: one token of the tokenizer, other than the placeholder of pictures that are read.
        tokens: how many a picture becomes.
        begin, end: text around them, which is learnt like the rest of the answer: by it the model says that it draws.
        learnt: whether the placeholders are labels too, for a model that puts its own codes in their place and whose
            targets they count as; else they are -100.
    """

    image_processor: Any
    token: str
    tokens: int
    begin: str = ""
    end: str = ""
    learnt: bool = False


@dataclass
class Placed:
    """A conversation and what belongs into its places, in its order.

    Attributes:
        messages: for the template; parts and markers are those that it takes, or placeholder tokens.
        media: kind to values, as they stand in the row.
        targets: pictures that the model is to draw.
    """

    messages: list[Message] = field(default_factory=list)
    media: dict[str, list[Any]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    targets: list[Any] = field(default_factory=list)

    def check(self, text: str, tokens: Mapping[str, str | None]) -> None:
        """DataError if the rendered text has not one placeholder for each."""
        for kind, values in self.media.items():
            token = tokens.get(kind)
            shown = text.count(token) if token else 0
            if shown != len(values):
                raise DataError(
                    f"the chat template writes {shown} placeholders {token} for {len(values)} {_WORDS[kind]} of the "
                    f"conversation"
                )


def place_media(
    messages: Sequence[Message],
    columns: Mapping[str, tuple[str, Sequence[Any]]],
    tokens: Mapping[str, str | None],
    template: ChatTemplate,
    generation: Generation | None = None,
) -> Placed:
    """The places of a conversation and what belongs there.

    Args:
        messages: see `normalize_example`. A place is a part `{"type": kind}`, with a "value" or without one, or a
            marker in a text (`MARKERS`), where the processor takes this kind.
        columns: kind to the name of a column and its values, of which places without a value take the next.
        tokens: kind to the placeholder token of the processor, None where it takes none of the kind.
        template: decides whether its content is parts or text.
        generation: None if nothing is drawn.

    Raises:
        DataError: a placeholder token stands in a text; a kind that the processor does not take; more or fewer values
            than places ("bad row").
    """
    placed = Placed()
    left = {kind: list(reversed(values)) for kind, (_, values) in columns.items()}
    places = dict.fromkeys(KINDS, 0)
    forbidden = {token: kind for kind, token in tokens.items() if token and token not in MARKERS.values()}
    if generation:
        forbidden[generation.token] = "image"
    for number, message in enumerate(messages, 1):
        content = message["content"]
        words = content_text(content)
        for written, kind in forbidden.items():
            if written in words:
                raise DataError(
                    f'message {number} has "{written}" in its text: write {MARKERS[kind]} for {_ONE[kind]}',
                    reason="bad row",
                )
        parts = []
        for part in _parts(content, tokens):
            kind = part["type"]
            if kind == "text":
                parts.append(part)
                continue
            token = tokens.get(kind)
            drawn = part.get("generation", generation is not None and message["role"] == "assistant")
            if kind == "image" and drawn:
                if generation is None:
                    raise DataError(f"message {number} has a picture to draw, but no generation is set up")
                held = placed.targets
                parts.append({"type": "text", "text": generation.begin + generation.token * generation.tokens})
                parts[-1]["text"] += generation.end
            elif not token:
                raise DataError(f"message {number} has {_ONE[kind]}, which the processor does not take")
            else:
                held = placed.media[kind]
                taken = template.takes(kind, token)
                parts.append({"type": kind} if taken else {"type": "text", "text": token})
            if "value" in part:
                held.append(part["value"])
            else:
                places[kind] += 1
                held.append(left[kind].pop() if left.get(kind) else None)
        if content is not None:
            only_text = all(part["type"] == "text" for part in parts)
            content = "".join(part["text"] for part in parts) if only_text else parts
        placed.messages.append({**message, "content": content})
    for kind, (name, values) in columns.items():
        if places[kind] != len(values):
            raise DataError(
                f'{len(values)} {_WORDS[kind]} in "{name}" but {places[kind]} places for them in the conversation: '
                f"it needs one {MARKERS[kind]} or {kind} part for each",
                reason="bad row",
            )
    return placed


def without_markers(text: str) -> str:
    """A text without its markers."""
    return _MARKER.sub("", text).strip()


def _parts(content: Any, tokens: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Content as a list of parts, with markers of the kinds that the processor takes as parts."""
    parts: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
        if part["type"] != "text" or "<" not in part["text"]:
            parts.append(part)
            continue
        at = 0
        for match in _MARKER.finditer(part["text"]):
            kind = KINDS[(match.lastindex or 1) - 1]
            if not tokens.get(kind):
                continue  # in the text of a model that does not take the kind it is a word like others
            if match.start() > at:
                parts.append({"type": "text", "text": part["text"][at : match.start()]})
            parts.append({"type": kind})
            at = match.end()
        if at < len(part["text"]):
            parts.append({"type": "text", "text": part["text"][at:]})
    return parts
