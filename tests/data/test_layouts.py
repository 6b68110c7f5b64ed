from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from veomni_data import (
    DataError,
    PackingCollator,
    get_chat_template,
    normalize_example,
    process_preference_example,
    process_sft_example,
)

ASKED = {"role": "user", "content": "What is their sum?"}
ANSWERED = {"role": "assistant", "content": "eight"}


def messages(row: dict[str, Any], **columns: str) -> list[dict[str, Any]]:
    return normalize_example(row, columns or None)["messages"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"messages": json.dumps([ASKED, ANSWERED])},
        {"conversations": [ASKED, ANSWERED]},
        {"conversations": [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": "eight"}]},
        {"conversation": [{"from": "user", "value": ASKED["content"]}, {"from": "assistant", "value": "eight"}]},
        {"instruction": "What is", "input": "their sum?", "output": "eight"},
        {"instruction": ASKED["content"], "input": "", "output": "eight"},
    ],
)
def test_a_layout_is_recognised_by_its_keys(row: dict[str, Any]) -> None:
    expected = ASKED["content"].replace(" their", "\ntheir") if row.get("input") else ASKED["content"]
    assert messages({**row, "other": 1}) == [{**ASKED, "content": expected}, ANSWERED]


def test_any_other_layout_is_mapped_by_columns() -> None:
    turns = [{"speaker": "human", "words": ASKED["content"]}, {"speaker": "bot", "words": "eight"}]
    row = {"data": {"dialog": turns}, "id": 3}
    assert messages(row, messages="data.dialog", role="speaker", content="words") == [ASKED, ANSWERED]
    assert messages({"q": ASKED["content"], "a": "eight"}, prompt="q", completion="a")[-1] == ANSWERED


def test_an_unknown_layout_is_told_what_is_there_and_what_is_known() -> None:
    with pytest.raises(
        DataError, match=r"columns \['answer', 'question'\]: known are messages or .* needs columns"
    ) as e:
        normalize_example({"question": "?", "answer": "!"})
    assert e.value.reason == "bad row"


def test_the_answers_of_a_prompt_are_not_learnt_but_its_completion_is(tokenizer: Any) -> None:
    row = {"prompt": [ASKED, ANSWERED, ASKED], "completion": [{"role": "assistant", "content": "three"}]}
    sample = process_sft_example(row, tokenizer, get_chat_template("chatml", tokenizer))
    assert tokenizer.decode(sample["input_ids"][sample["labels"] != -100]) == "three<|im_end|>"


def test_history_and_system_come_first() -> None:
    row = {"instruction": "there", "output": "eight", "history": [["Hello", "world"]], "system": "digits"}
    said = [(m["role"], m["content"]) for m in messages(row)]
    assert said == [
        ("system", "digits"),
        ("user", "Hello"),
        ("assistant", "world"),
        ("user", "there"),
        ("assistant", "eight"),
    ]


def test_function_calls_of_sharegpt_are_tool_calls_of_openai() -> None:
    call = {"name": "add", "arguments": {"a": 3}}
    sharegpt = [
        {"from": "human", "value": "sum?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "8"},
        {"from": "gpt", "value": "eight"},
    ]
    openai = [
        {"role": "user", "content": "sum?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {**call, "arguments": '{"a": 3}'}}],
        },
        {"role": "tool", "content": "8", "tool_call_id": "1", "name": None},
        {"role": "assistant", "content": "eight", "tool_calls": None},
    ]
    ours, theirs = messages({"conversations": sharegpt}), messages({"messages": openai})
    assert [m["role"] for m in ours] == [m["role"] for m in theirs] == ["user", "assistant", "tool", "assistant"]
    assert ours[1]["tool_calls"][0]["function"] == theirs[1]["tool_calls"][0]["function"] == call
    assert ours[1]["content"] is theirs[1]["content"] is None
    assert "tool_calls" not in theirs[3]
    assert "name" not in theirs[2]


def test_tools_may_be_json_and_bare_functions() -> None:
    tool = {"name": "add", "parameters": {}}
    wrapped = [{"type": "function", "function": tool}]
    for tools in (wrapped, json.dumps(wrapped), [tool], json.dumps([tool])):
        assert normalize_example({"messages": [ASKED, ANSWERED], "tools": tools})["tools"] == wrapped
    assert "tools" not in normalize_example({"messages": [ASKED, ANSWERED], "tools": None})


def test_speakers_are_known_in_capitals_too() -> None:
    turns = [{"from": "Human", "value": "What is their sum?"}, {"from": "Assistant", "value": "eight"}]
    assert messages({"conversations": turns}) == [ASKED, ANSWERED]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png", "text": None},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "input_image", "image_url": "a.png"},
        {"type": "image", "image_url": "a.png", "detail": "low"},
        {"type": "image", "source": "a.png"},
    ],
)
def test_a_part_says_where_its_picture_is_in_any_way(part: dict[str, Any]) -> None:
    found = messages({"messages": [{"role": "user", "content": [part, "Hello"]}, ANSWERED]})[0]["content"]
    assert found == [{"type": "image", "value": "a.png"}, {"type": "text", "text": "Hello"}]


def test_the_row_is_left_as_it_was() -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": "x", "tool_calls": [], "n": None}], "tools": "[]"}
    before = json.dumps(row)
    normalize_example(row)
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": [{"from": "alien", "value": "x"}]}, 'message 1 of "messages" is from "alien": known are system'),
        ({"messages": [{"role": "user"}]}, 'message 1 of "messages" has no "role" with "content"'),
        ({"messages": [{"role": "user", "content": None}]}, "has no content"),
        ({"messages": [{**ANSWERED, "weight": 0.5}]}, "has the weight 0.5: it must be 0 or 1"),
        ({"messages": [{**ANSWERED, "tool_calls": [{"f": 1}]}]}, "a tool call of message 1 .* names no function"),
        ({"messages": "[1"}, '"messages" is not JSON'),
        ({"messages": [ASKED, ANSWERED], "tools": "{"}, '"tools" is not JSON'),
        ({"messages": [ASKED, ANSWERED], "tools": [1]}, '"tools" must be a list of descriptions'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "picture": "a.png"}]}], "images": ["b.png"]},
            'the image part of message 1 of "messages" has "picture", but what it shows is expected in one of image',
        ),
        ({"prompt": "x"}, 'a "prompt" but no "completion"'),
        ({"instruction": "x", "output": 3}, '"output" must be a text, not 3'),
        ({"instruction": "x", "output": "y", "history": ["z"]}, '"history" must be a list of pairs'),
        ({"chosen": "x", "rejected": "y"}, '"chosen" is a text, but there is no "prompt"'),
    ],
)
def test_what_is_wrong_with_a_row_is_one_sentence(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        normalize_example(row)


def test_a_mistyped_name_of_columns_is_told_what_there_is() -> None:
    with pytest.raises(DataError, match='columns maps "mesages", which is none of text, messages'):
        normalize_example({"a": []}, {"mesages": "a"})
    with pytest.raises(DataError, match=r'no column "a\.b"'):
        normalize_example({"a": {}}, {"messages": "a.b"})


GOOD, BAD = {"role": "assistant", "content": "eight"}, {"role": "assistant", "content": "five"}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "there"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [*EARLIER, ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [*EARLIER, ASKED], "chosen": "eight", "rejected": "five"},
        {"chosen": [*EARLIER, ASKED, GOOD], "rejected": [*EARLIER, ASKED, BAD]},
        {"prompt": "Hello", "chosen": [*EARLIER, ASKED, GOOD], "rejected": [*EARLIER, ASKED, BAD]},
        {
            "conversations": [
                {"from": "human", "value": "Hello"},
                {"from": "gpt", "value": "there"},
                {"from": "human", "value": ASKED["content"]},
            ],
            "chosen": {"from": "gpt", "value": "eight"},
            "rejected": {"from": "gpt", "value": "five"},
        },
    ],
)
def test_a_preference_is_one_row_of_two_of_which_only_the_difference_is_learnt(
    tokenizer: Any, row: dict[str, Any]
) -> None:
    encode = partial(process_sft_example, tokenizer=tokenizer, template=get_chat_template("chatml", tokenizer))
    pair = process_preference_example(row, encode)
    lengths = pair["seq_lens"]
    halves = [
        (ids, ids[labels != -100])
        for ids, labels in zip(pair["input_ids"].split(lengths), pair["labels"].split(lengths), strict=True)
    ]
    assert [tokenizer.decode(learnt) for _, learnt in halves] == ["eight<|im_end|>", "five<|im_end|>"]
    for ids, _ in halves:
        assert tokenizer.decode(ids).startswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nthere")


def test_collated_pairs_are_segments_of_their_own(tokenizer: Any) -> None:
    encode = partial(process_sft_example, tokenizer=tokenizer, template=get_chat_template("chatml", tokenizer))
    pair = process_preference_example({"prompt": "Hello", "chosen": "eight", "rejected": "five"}, encode)
    batch = PackingCollator()([pair, pair])
    assert batch["preference"].tolist() == [1, 0, 1, 0]
    first, second = pair["seq_lens"]
    assert batch["cu_seq_lens_q"].tolist() == [0, first, first + second, 2 * first + second, 2 * (first + second)]
    assert batch["position_ids"][0, : first + 1].tolist() == [*range(first), 0]
    assert all(value is not None and (isinstance(value, (torch.Tensor, int))) for value in batch.values())


def test_a_preference_that_prefers_nothing_is_refused(tokenizer: Any) -> None:
    encode = partial(process_sft_example, tokenizer=tokenizer, template=get_chat_template("chatml", tokenizer))
    with pytest.raises(DataError, match="are the same") as error:
        process_preference_example({"prompt": "Hello", "chosen": "eight", "rejected": "eight"}, encode)
    assert error.value.reason == "nothing to learn"
    with pytest.raises(DataError, match="no preference"):
        process_preference_example({"messages": [ASKED, ANSWERED]}, encode)
    with pytest.raises(DataError, match=r"\d+ \+ \d+ tokens, more than max_seq_len=20") as error:
        process_preference_example({"prompt": "Hello", "chosen": "eight", "rejected": "five"}, encode, max_seq_len=20)
    assert error.value.reason == "too long"
    with pytest.raises(DataError, match="use process_preference_example"):
        encode({"prompt": "Hello", "chosen": "eight", "rejected": "five"})
