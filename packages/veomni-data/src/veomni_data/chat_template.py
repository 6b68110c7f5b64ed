"""Conversations into text, and which part of that text the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .collators import IGNORED_LABEL
from .errors import DataError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # characters [begin, end)

# A line a role, as many chat models are trained; what the assistant is to learn ends with the end-of-turn token.
CHATML = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

TEMPLATES: dict[str, str] = {"chatml": CHATML}
"""Jinja sources by name: plain data, to which `register_chat_template` adds."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_IMAGE_PART = re.compile(r"""['"]image['"]""")
_ANSWER = "veomni-probe-answer"


class ChatTemplate:
    """A Jinja chat template and the tokenizer that it is written for.

    Args:
        source: the Jinja source, as in `tokenizer.chat_template`.
        tokenizer: a fast transformers tokenizer: masks need the place of each token in the text.

    Raises:
        DataError: the tokenizer is not a fast one.
    """

    def __init__(self, source: str, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} cannot tell where in the text a token is: use a fast tokenizer"
            )
        self.source = source
        self.tokenizer = tokenizer
        self.marks_generation = bool(_GENERATION.search(source))
        self.takes_parts = bool(_IMAGE_PART.search(source))  # content may be a list that says where pictures are
        self._end_of_turn: str | None = None

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, with the assistant's header behind it if `add_generation_prompt`."""
        return self._render(messages, add_generation_prompt)[0]

    def render_with_spans(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text of a conversation and the characters that the assistant is to learn, end-of-turn token included.

        They are those between `{% generation %}` and `{% endgeneration %}` where the template has these. Otherwise each
        assistant turn begins where the conversation before it ends with its generation prompt, and ends with the first
        end-of-turn token after its content; a template that does not render turns in this way is refused.

        Raises:
            DataError: the template refuses the conversation, or its turns cannot be found.
        """
        text, spans = self._render(messages, False)
        if self.marks_generation:
            return text, spans
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                begin = self._turn_begin(messages, index, text)
                if spans and begin < spans[-1][1]:
                    raise self._inconsistent(index)
                spans.append((begin, self._turn_end(message, index, text, begin)))
        return text, spans

    def encode(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Token ids of a conversation and its labels: the ids of the assistant's turns, -100 elsewhere."""
        text, spans = self.render_with_spans(messages)
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return tokens["input_ids"], mask_outside(spans, tokens["input_ids"], tokens["offset_mapping"])

    def _render(self, messages: Messages, add_generation_prompt: bool) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=self.source,
                return_assistant_tokens_mask=self.marks_generation,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: such as a string added to None
            raise DataError(f"the chat template cannot render this conversation: {error}") from error
        return texts[0], list(spans[0]) if self.marks_generation else []

    def _turn_begin(self, messages: Messages, index: int, text: str) -> int:
        before = self.render(messages[:index], add_generation_prompt=True)
        if not text.startswith(before):
            raise self._inconsistent(index)
        return len(before)

    def _turn_end(self, message: Mapping[str, Any], index: int, text: str, begin: int) -> int:
        end_of_turn = self._find_end_of_turn()
        content = content_text(message.get("content")).strip()
        at = text.find(content, begin)
        end = text.find(end_of_turn, at + len(content)) if at >= 0 else -1
        if end < 0:
            raise self._inconsistent(index)
        return end + len(end_of_turn)

    def _find_end_of_turn(self) -> str:
        """What stands behind an answer, up to the first special token (blanks behind that are no business of it)."""
        if self._end_of_turn is None:
            probe = [{"role": "user", "content": "veomni-probe-question"}, {"role": "assistant", "content": _ANSWER}]
            _, found, tail = self.render(probe).rpartition(_ANSWER)
            if not found:
                raise DataError("the chat template does not show what the assistant says")
            special = [token for token in self.tokenizer.all_special_tokens if token and token in tail]
            ends = [tail.index(token) + len(token) for token in special]
            self._end_of_turn = tail[: min(ends)] if ends else tail
        return self._end_of_turn

    def _inconsistent(self, index: int) -> DataError:
        return DataError(
            f"the chat template renders message {index + 1} differently when others follow, so that the part to learn "
            f"cannot be found: put {{% generation %}} and {{% endgeneration %}} around it in the template"
        )


def get_chat_template(name: str, tokenizer: Any, *, templates: Mapping[str, str] = TEMPLATES) -> ChatTemplate:
    """A template by name: one of `templates`, or "default", which is the tokenizer's own, or ChatML if it has none.

    Raises:
        DataError: no template has this name; the tokenizer's own is a choice of several.
    """
    if name != "default":
        if name not in templates:
            raise DataError(f'no chat template is called "{name}": there are "default" and {sorted(templates)}')
        return ChatTemplate(templates[name], tokenizer)
    own = tokenizer.chat_template
    if isinstance(own, Mapping):  # several by name, of which transformers means this one by default
        own = own.get("default")
        if own is None:
            raise DataError(f"the tokenizer has the chat templates {sorted(tokenizer.chat_template)} but no default")
    return ChatTemplate(own or CHATML, tokenizer)


def register_chat_template(name: str, source: str, *, templates: dict[str, str] = TEMPLATES) -> None:
    """Add a Jinja template under a name that `get_chat_template` then knows.

    Raises:
        DataError: another source has the name.
    """
    if name == "default" or templates.get(name, source) != source:
        raise DataError(f'there is another chat template called "{name}"')
    templates[name] = source


def content_text(content: Any) -> str:
    """The text of a message's content: a string, a list of parts of which those of type "text" count, or None."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


def checked_messages(example: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The conversation of a row; DataError if it is not a list of messages with a role and content."""
    if key not in example:
        raise DataError(f'there is no column "{key}" but {sorted(example)}')
    messages = example[key]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f'"{key}" must be a list of at least one message')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f'message {number} of "{key}" has no "role"')
        content = message.get("content")
        if content is None and message["role"] == "assistant" and message.get("tool_calls"):
            continue
        parts = [] if isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not all(_is_part(part) for part in parts):
            raise DataError(f'the content of message {number} of "{key}" is neither text nor a list of parts')
    return [dict(message) for message in messages]


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    return isinstance(part.get("text"), str) if part.get("type") == "text" else part.get("type") == "image"


def mask_outside(spans: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span]) -> list[int]:
    """Labels: the id of each token that begins within one of the ascending spans and is not empty, -100 elsewhere."""
    labels = [IGNORED_LABEL] * len(ids)
    spans_left = iter(spans)
    span = next(spans_left, None)
    for i, (begin, end) in enumerate(offsets):
        while span is not None and begin >= span[1]:
            span = next(spans_left, None)
        if span is None:
            break
        if begin >= span[0] and end > begin:
            labels[i] = ids[i]
    return labels
