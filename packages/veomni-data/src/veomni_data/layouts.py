"""The layouts in which conversations and preferences are written, into messages with a role and content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import DataError
from .row import rename_columns

Message = dict[str, Any]

# what ShareGPT and its relatives call who speaks
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_OURS = ("system", "user", "assistant", "tool", "developer", "function")
_CONVERSATIONS = ("messages", "conversations", "conversation")
# which keys a turn has its speaker and words under
_TurnKeys = Sequence[tuple[str, str]]
_TURNS: _TurnKeys = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))
_PARTS = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
# where a part holds its picture, video or sound, beside under its own type
_HOLDERS = ("path", "url", "base64", "bytes", "data", "source")
_BESIDE = ("type", "text", "detail", "format")
_KNOWN = (
    "messages or conversations (a list of turns with role and content, or from and value), prompt and completion, "
    "instruction and output, or chosen and rejected"
)
_TURN_COLUMNS = ("role", "content")
COLUMNS = (
    *("text", "messages", "system", "tools", "prompt", "completion", "instruction", "input", "output", "history"),
    *("chosen", "rejected", "images", "videos", "audios", *_TURN_COLUMNS),
)
"""What `columns` may map: our names."""


def normalize_example(example: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A row with its conversation as `messages`, or its preference as `chosen` and `rejected`, both lists of messages.

    Recognised by their keys, in this order:

    - chosen and rejected: whole conversations, or what follows `prompt` (or any conversation of the row)
    - OpenAI: messages, a list of `{"role": ..., "content": ...}`
    - ShareGPT: conversations, a list of `{"from": "human" | "gpt" | ..., "value": ...}`
    - prompt and completion, each a text or a list of messages; the turns of the prompt are not learnt
    - Alpaca: instruction and output, with input, and history (a list of pairs)

    A message is a dict of its own with `role`; `content`, which is a text, a list of parts, or None beside
    `tool_calls`; and what else it came with and is not None. A part is `{"type": "text", "text": ...}`, or
    `{"type": "image" | "video" | "audio"}` with a "value" if it holds one. Arguments of tool calls are objects, also
    where they came as JSON. `tools`, if there, is a list of `{"type": "function", "function": {...}}`, also where it
    came as JSON. A column `system` becomes the
    first message if there is none of that role.

    Args:
        example: a row.
        columns: for any other layout, our names (`COLUMNS`) to the row's: {"messages": "data.dialog", "role":
            "speaker", "content": "words"}; a dot leads into a column.

    Returns:
        A dict of the row's columns; it shares with the row what is not part of the conversation.

    Raises:
        DataError: of no layout that is known, or not as its layout says ("bad row").
    """
    row = dict(example)
    turn_keys: _TurnKeys = _TURNS
    if columns:
        if unknown := [ours for ours in columns if ours not in COLUMNS]:
            raise DataError(f'columns maps "{unknown[0]}", which is none of {", ".join(COLUMNS)}', reason="bad row")
        row = rename_columns(row, {ours: theirs for ours, theirs in columns.items() if ours not in _TURN_COLUMNS})
        if any(key in columns for key in _TURN_COLUMNS):
            turn_keys = ((columns.get("role", "role"), columns.get("content", "content")),)
    if _there(row, "chosen", "rejected"):
        prompt = _conversation(row, turn_keys) if _there(row, "prompt") or _has_turns(row) else None
        if prompt is None and _there(row, "instruction"):
            prompt = _alpaca(row)
        for key in ("chosen", "rejected"):
            row[key] = _with_system(row, _continued(prompt or [], row[key], key, turn_keys))
    else:
        row["messages"] = _with_system(row, _conversation(row, turn_keys))
    if row.get("tools") is None:
        row.pop("tools", None)
    else:
        row["tools"] = _tools(row["tools"])
    return row


def _there(row: Mapping[str, Any], *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


def _has_turns(row: Mapping[str, Any]) -> bool:
    return any(row.get(key) is not None for key in _CONVERSATIONS)


def _conversation(row: Mapping[str, Any], turn_keys: _TurnKeys) -> list[Message]:
    """The messages of a row that is no preference."""
    for key in _CONVERSATIONS:
        if row.get(key) is not None:
            return _messages(row[key], key, turn_keys)
    if _there(row, "prompt"):
        prompt = _turns_of(row["prompt"], "prompt", "user", turn_keys)
        if not _there(row, "completion"):
            if "chosen" in row:
                return prompt
            raise DataError(
                f'there is a "prompt" but no "completion": the columns are {sorted(row)}', reason="no answer"
            )
        for message in prompt:
            if message["role"] == "assistant":
                message.setdefault("weight", 0)
        return prompt + _turns_of(row["completion"], "completion", "assistant", turn_keys)
    if _there(row, "instruction", "output"):
        return [*_alpaca(row), {"role": "assistant", "content": _text(row["output"], "output")}]
    raise DataError(
        f"no conversation is found in the columns {sorted(map(str, row))}: known are {_KNOWN}; any other layout needs "
        f'columns, such as {{"messages": "the column with the turns"}}',
        reason="bad row",
    )


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    """The question of an Alpaca row, with what was said before it."""
    messages: list[Message] = []
    history = row.get("history") or []
    if not _is_list(history) or not all(_is_list(pair) and len(pair) == 2 for pair in history):
        raise DataError('"history" must be a list of pairs of question and answer', reason="bad row")
    for question, answer in history:
        messages.append({"role": "user", "content": _text(question, "history")})
        messages.append({"role": "assistant", "content": _text(answer, "history")})
    asked = [_text(row[key], key) for key in ("instruction", "input") if row.get(key)]
    return [*messages, {"role": "user", "content": "\n".join(asked)}]


def _continued(prompt: list[Message], value: Any, key: str, turn_keys: _TurnKeys) -> list[Message]:
    """The prompt and what follows it; the value alone if it is the whole conversation."""
    if isinstance(value, str) and not prompt:
        raise DataError(f'"{key}" is a text, but there is no "prompt" that it answers', reason="bad row")
    if isinstance(value, Mapping):
        value = [value]
    messages = _turns_of(value, key, "assistant", turn_keys)
    if messages[0]["role"] == "assistant" and prompt:
        return [dict(message) for message in prompt] + messages
    return messages


def _turns_of(value: Any, key: str, role: str, turn_keys: _TurnKeys) -> list[Message]:
    """What may be a text said by `role`, or messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, key, turn_keys)


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = row.get("system")
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": _text(system, "system")}, *messages]
    return messages


def _messages(turns: Any, key: str, turn_keys: _TurnKeys) -> list[Message]:
    if isinstance(turns, str) and turns.lstrip()[:1] == "[":
        turns = _json(turns, f'"{key}"')
    if not _is_list(turns) or not len(turns):
        raise DataError(f'"{key}" must be a list of at least one message', reason="bad row")
    return [_message(turn, f'message {number} of "{key}"', turn_keys) for number, turn in enumerate(turns, 1)]


def _message(turn: Any, place: str, turn_keys: _TurnKeys) -> Message:
    who = words = ""
    for who, words in turn_keys:
        # content is not there beside tool calls
        if isinstance(turn, Mapping) and isinstance(turn.get(who), str) and (words in turn or "tool_calls" in turn):
            break
    else:
        first = turn_keys[0][0]
        raise DataError(f'{place} has no "{first}" with "{turn_keys[0][1]}": {_shown(turn)}', reason="bad row")
    # Arrow gives each message the keys of all
    message = {name: value for name, value in turn.items() if value is not None and name not in (who, words)}
    role, content = turn[who], turn.get(words)
    message = {"role": role if role in _OURS else _role(role), "content": content, **message}
    if who != "role" and message["role"] not in _OURS:
        raise DataError(
            f'{place} is from "{role}": known are {", ".join([*_OURS, *ROLES])}',
            reason="bad row",
        )
    if role.lower() == "function_call":
        message |= {"content": None, "tool_calls": _function_calls(content, place)}
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, place) for call in message["tool_calls"]]
        if not message["tool_calls"]:
            del message["tool_calls"]
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"{place} has the weight {weight}: it must be 0 or 1", reason="bad row")
    if message["content"] is None and not ("tool_calls" in message and message["role"] == "assistant"):
        raise DataError(f"{place} has no content", reason="bad row")
    if message["content"] is not None and not isinstance(message["content"], str):
        message["content"] = _parts(message["content"], place)
    return message


def _role(name: str) -> str:
    """The role that a speaker's name means, also written "Human" or "USER"; the name itself if none is known."""
    small = name.lower()
    return small if small in _OURS else ROLES.get(small, name)


def _parts(content: Any, place: str) -> list[dict[str, Any]]:
    content = [content] if isinstance(content, Mapping) else content
    if not _is_list(content):
        raise DataError(f"the content of {place} is neither text nor a list of parts", reason="bad row")
    return [_part(part, place) for part in content]


def _part(part: Any, place: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping):
        name = part.get("type")
        if name in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if name in _PARTS:
            kind = _PARTS[name]
            keys = (name, *(key for key, held in _PARTS.items() if held == kind), *_HOLDERS)
            held = next((part[key] for key in keys if part.get(key) is not None), None)
            found: dict[str, Any] = {"type": kind}
            if held is not None:
                found["value"] = held
            elif odd := [key for key, value in part.items() if key not in _BESIDE and _may_hold(value)]:
                # else it would take the next of the column, which may be another one's
                raise DataError(
                    f'the {kind} part of {place} has "{odd[0]}", but what it shows is expected in one of '
                    f"{', '.join(dict.fromkeys(keys))}",
                    reason="bad row",
                )
            if part.get("generation") is not None:
                found["generation"] = bool(part["generation"])
            return found
    raise DataError(
        f"the content of {place} is neither text nor a list of parts of type text, image, video or audio: "
        f"{_shown(part)}",
        reason="bad row",
    )


def _may_hold(value: Any) -> bool:
    return value is not None and not isinstance(value, (int, float))


def _function_calls(value: Any, place: str) -> list[Any]:
    calls = _json(value, f"the function call of {place}") if isinstance(value, str) else value
    return list(calls) if _is_list(calls) else [calls]


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """A call as chat templates read it: {"type": "function", "function": {"name": ..., "arguments": {...}}, ...}."""
    if isinstance(call, Mapping) and isinstance(call.get("name"), str):
        call = {"type": "function", "function": call}
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool call of {place} names no function: {_shown(call)}", reason="bad row")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"the arguments of a tool call of {place}") if arguments.strip() else {}
    rest = {key: value for key, value in call.items() if value is not None}
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def _tools(tools: Any) -> list[Any]:
    if isinstance(tools, str):
        tools = _json(tools, '"tools"') if tools.strip() else []
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f'"tools" must be a list of descriptions of functions, not {_shown(tools)}', reason="bad row")
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in tools]


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise DataError(f'"{key}" must be a text, not {_shown(value)}', reason="bad row")
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} is not JSON ({error.msg}, column {error.colno})", reason="bad row") from error


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
