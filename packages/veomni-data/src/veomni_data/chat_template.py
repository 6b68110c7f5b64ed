"""Conversations into text, and which part of that text the assistant says."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
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
_QUESTION, _ANSWER = "veomni-probe-question", "veomni-probe-answer"
_PROBE: dict[str, Any] = {"role": "user", "content": _QUESTION}
_REPLY: dict[str, Any] = {"role": "assistant", "content": _ANSWER}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_END_OF_REASONING = "</think>"


class ChatTemplate:
    """A Jinja chat template and the tokenizer that it is written for.

    Messages are as `normalize_example` gives them. What is peculiar to a template (whether it takes texts or lists of
    parts, objects or JSON as the arguments of a tool call) is found out by rendering, and adapted to.

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
        self._takes: dict[tuple[str, str], bool] = {}

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation, with the assistant's header behind it if `add_generation_prompt`.

        Args:
            messages: `{"role": ..., "content": text, list of parts or None, ...}`, see `normalize_example`.
            tools: descriptions of functions, for templates that show them.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._render([self._adapted(message) for message in messages], tools, add_generation_prompt)[0]

    def render_with_spans(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[Span]]:
        """The text of a conversation and the characters that the assistant is to learn, end-of-turn token included.

        They are those between `{% generation %}` and `{% endgeneration %}` where the template has these. Otherwise each
        assistant turn begins where the conversation before it ends with its generation prompt, and ends with the first
        end-of-turn token after its content; a template that does not render turns in this way is refused.

        Not learnt: a message with `"weight": 0`; and one of an earlier turn whose reasoning the template leaves out
        when others follow, for the assistant would not have said it so.

        Raises:
            DataError: the template refuses the conversation, its turns cannot be found, or it never shows reasoning.
        """
        adapted = [self._adapted(message) for message in messages]
        text, marked = self._render(adapted, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learnt = [i for i in turns if messages[i].get("weight", 1)]
        if not self.marks_generation:
            spans = self._find_turns(messages, adapted, tools, text, learnt)
        elif len(marked) == len(turns):
            spans = dict(zip(turns, marked, strict=True))
        elif len(learnt) == len(turns):
            return text, marked
        else:
            raise DataError(
                f"{len(turns)} messages are the assistant's, but the chat template marks {len(marked)} parts with "
                f'{{% generation %}}, so that which has "weight": 0 cannot be told'
            )
        last_question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        shown = []
        for i in learnt:
            turn = text[slice(*spans[i])]
            if any(call["function"]["name"] not in turn for call in messages[i].get("tool_calls", ())):
                raise DataError(f"the chat template does not show the tool calls of message {i + 1}")
            if _reasoning(messages[i]) in turn:
                shown.append(spans[i])
            elif i > last_question:
                raise DataError(
                    f"the chat template does not show the reasoning of message {i + 1}: use one that does, or leave "
                    f"the reasoning out"
                )
        return text, shown

    def encode(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation and its labels: the ids of the assistant's turns, -100 elsewhere."""
        text, spans = self.render_with_spans(messages, tools=tools)
        tokens = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return tokens["input_ids"], mask_outside(spans, tokens["input_ids"], tokens["offset_mapping"])

    def takes(self, kind: str, token: str) -> bool:
        """Whether the template writes `token` for a part `{"type": kind}` of a message's content."""
        if (kind, token) not in self._takes:
            parts = [{"type": kind}, {"type": "text", "text": _QUESTION}]
            try:
                text = self._render([{"role": "user", "content": parts}])[0]
            except DataError:
                text = ""
            self._takes[kind, token] = token in text and _QUESTION in text
        return self._takes[kind, token]

    def _render(
        self,
        adapted: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [adapted],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=self.marks_generation,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: such as a string added to None
            raise DataError(f"the chat template cannot render this conversation: {error}") from error
        if any(_name(tool) not in texts[0] for tool in tools or ()):
            raise DataError("the chat template does not show the tools of this conversation")
        return texts[0], list(spans[0]) if self.marks_generation else []

    def _adapted(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message in the form that this template reads."""
        adapted = {key: value for key, value in message.items() if key != "weight"}
        content = message.get("content")
        if self._needs_parts:
            if isinstance(content, str):
                adapted["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and all(part["type"] == "text" for part in content):
            adapted["content"] = content_text(content)
        if message.get("tool_calls") and self._arguments_are_text:
            adapted["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _as_json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        return adapted

    @cached_property
    def _needs_parts(self) -> bool:
        """Whether the template loses content that is a text, but not a list of parts."""
        in_parts = {"role": "user", "content": [{"type": "text", "text": _QUESTION}]}
        return not self._shows(_QUESTION, [_PROBE]) and self._shows(_QUESTION, [in_parts])

    @cached_property
    def _arguments_are_text(self) -> bool:
        """Whether the template takes the arguments of a tool call as JSON, but not as an object."""

        def calls(arguments: Any) -> list[dict[str, Any]]:
            call = {"type": "function", "id": "call00000", "function": {"name": "probe", "arguments": arguments}}
            return [_PROBE, {"role": "assistant", "content": None, "tool_calls": [call]}]

        arguments = {"veomni": _ANSWER}
        return not self._shows(_ANSWER, calls(arguments)) and self._shows(_ANSWER, calls(_as_json(arguments)))

    def _shows(self, words: str, adapted: list[dict[str, Any]]) -> bool:
        try:
            return words in self._render(adapted)[0]
        except DataError:
            return False

    def _find_turns(
        self,
        messages: Messages,
        adapted: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        text: str,
        turns: Sequence[int],
    ) -> dict[int, Span]:
        spans: dict[int, Span] = {}
        last = 0
        for i in turns:
            before = self._render(adapted[:i], tools, True)[0]
            if not text.startswith(before):
                # a generation prompt may open the reasoning too, which an answer without any does not have
                before = self._render(adapted[:i], tools)[0] + self._header
            # a space that ends the header is a part of the answer's first token in most vocabularies
            begin = len(before.rstrip(" "))
            if not text.startswith(before) or begin < last:
                raise _inconsistent(i)
            # what ends a tool call may be another token than what ends an answer
            after = self._render(adapted[: i + 1], tools)[0] if messages[i].get("tool_calls") else None
            if after is not None and text.startswith(after):
                ends = [after.rfind(token) + len(token) for token in self._special if token in after[begin:]]
                last = max(ends, default=len(after))
            else:
                last = self._turn_end(messages[i], text, begin, i)
            spans[i] = (begin, last)
        return spans

    def _turn_end(self, message: Mapping[str, Any], text: str, begin: int, index: int) -> int:
        """Behind the first end-of-turn token after the content, or after what of it is no reasoning."""
        content = content_text(message.get("content"))
        for words in (content.strip(), content.rpartition(_END_OF_REASONING)[2].strip()):
            at = text.find(words, begin)
            end = text.find(self._end_of_turn, at + len(words))
            if at >= 0 and end >= 0:
                return end + len(self._end_of_turn)
        raise _inconsistent(index)

    @cached_property
    def _special(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        marked = [token.content for token in added if token.special]
        return [token for token in dict.fromkeys([*self.tokenizer.all_special_tokens, *marked]) if token]

    @cached_property
    def _header(self) -> str:
        """What stands between a question and its answer, whatever the answer is."""
        question = [self._adapted(_PROBE)]
        prompt, answered = self._render(question, None, True)[0], self._render([*question, self._adapted(_REPLY)])[0]
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, answered, strict=False)))
        return prompt[len(self._render(question)[0]) : common]

    @cached_property
    def _end_of_turn(self) -> str:
        """What stands behind an answer, up to the first special token (blanks behind that are no business of it)."""
        _, found, tail = self.render([_PROBE, _REPLY]).rpartition(_ANSWER)
        if not found:
            raise DataError("the chat template does not show what the assistant says")
        ends = [tail.index(token) + len(token) for token in self._special if token in tail]
        return tail[: min(ends)] if ends else tail


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


def mask_outside(spans: Sequence[Span], ids: Sequence[int], offsets: Sequence[Span]) -> list[int]:
    """Labels: the id of each token that begins within one of the spans, -100 elsewhere.

    Args:
        spans: characters [begin, end), ascending.
        ids: T token ids.
        offsets: the characters of each, T, ascending. One that has none (blanks, where a tokenizer leaves them out) is
            within a span if it is not at its begin.
    """
    labels = [IGNORED_LABEL] * len(ids)
    for begin, end in spans:
        first, last = bisect_left(offsets, (begin, begin + 1)), bisect_left(offsets, (end, 0))
        labels[first:last] = ids[first:last]
    return labels


def _reasoning(message: Mapping[str, Any]) -> str:
    """What a message says to itself, in a field of its own or within its content; "" without."""
    own = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), None)
    if own is None:
        before, found, _ = content_text(message.get("content")).rpartition(_END_OF_REASONING)
        own = before.rpartition("<think>")[2] if found else ""
    return own.strip()


def _name(tool: Mapping[str, Any]) -> str:
    name = tool.get("function", tool).get("name")
    return name if isinstance(name, str) else ""


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _inconsistent(index: int) -> DataError:
    return DataError(
        f"the chat template renders message {index + 1} differently when others follow, so that the part to learn "
        f"cannot be found: put {{% generation %}} and {{% endgeneration %}} around it in the template, or give the "
        f'message "weight": 0'
    )
