from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from veomni_data import (
    DataError,
    get_chat_template,
    process_pretrain_example,
    process_sft_example,
    register_chat_template,
)

TURNS = [
    {"role": "system", "content": "Hello"},
    {"role": "user", "content": "What is their sum?"},
    {"role": "assistant", "content": "eight"},
    {"role": "user", "content": "there"},
    {"role": "assistant", "content": " three,\nfive"},
]
LEARNT = "eight<|im_end|> three,\nfive<|im_end|>"

UNMARKED = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# as reasoning models write it: only the last answer shows that it was thought about
THINKING = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# the first line changes with the number of messages: what came before a turn cannot be found
COUNTING = """{{ messages | length }}{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"""


def learnt(tokenizer: Any, sample: dict[str, torch.Tensor]) -> str:
    ids, labels = sample["input_ids"], sample["labels"]
    assert ids.dtype == labels.dtype == torch.int64
    assert ids.shape == labels.shape
    assert labels[labels != -100].equal(ids[labels != -100])
    return tokenizer.decode(ids[labels != -100])


def sft(tokenizer: Any, messages: Any = TURNS, template: str = "chatml", max_seq_len: int = 512) -> dict[str, Any]:
    named = get_chat_template(template, tokenizer)
    return process_sft_example({"messages": messages, "task": 1}, tokenizer, named, max_seq_len=max_seq_len)


def test_only_assistant_turns_are_learnt_with_their_end_of_turn(tokenizer: Any) -> None:
    sample = sft(tokenizer)
    assert sorted(sample) == ["input_ids", "labels"]
    assert learnt(tokenizer, sample) == LEARNT
    assert tokenizer.decode(sample["input_ids"]).startswith(
        "<|im_start|>system\nHello<|im_end|>\n<|im_start|>user\nWhat"
    )


def test_a_token_that_begins_in_the_prompt_is_not_learnt(tokenizer: Any) -> None:
    # the header ends in a line break, and two line breaks are one token
    sample = sft(tokenizer, [*TURNS[:2], {"role": "assistant", "content": "\n five"}])
    assert "\n\n" in tokenizer.batch_decode(sample["input_ids"][:, None])
    assert learnt(tokenizer, sample) == " five<|im_end|>"


def test_a_template_without_generation_marks_gives_the_same_mask(tokenizer: Any) -> None:
    tokenizer.chat_template = UNMARKED
    marked, unmarked = sft(tokenizer), sft(tokenizer, template="default")
    assert unmarked["input_ids"].equal(marked["input_ids"])
    assert unmarked["labels"].equal(marked["labels"])


def test_turns_of_a_template_that_thinks_only_in_the_last_answer_are_found(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    expected = "eight<|im_end|><think>\n\n</think>\n\n three,\nfive<|im_end|>"
    assert learnt(tokenizer, sft(tokenizer, template="default")) == expected


def test_an_answer_that_repeats_the_question_is_found_in_its_place(tokenizer: Any) -> None:
    tokenizer.chat_template = UNMARKED
    turns = [{"role": "user", "content": "eight"}, {"role": "assistant", "content": "eight"}]
    sample = sft(tokenizer, turns, "default")
    assert learnt(tokenizer, sample) == "eight<|im_end|>"
    assert sample["labels"].equal(sft(tokenizer, turns)["labels"])


def test_a_template_whose_turns_cannot_be_found_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = COUNTING
    with pytest.raises(DataError, match=r"message 3 differently .* generation %\}"):
        sft(tokenizer, template="default")


def test_a_refusal_of_the_template_is_one_sentence(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="cannot render this conversation: roles must alternate"):
        sft(tokenizer, template="default")


def test_without_a_template_of_its_own_a_tokenizer_gets_chatml(tokenizer: Any) -> None:
    assert get_chat_template("default", tokenizer).source == get_chat_template("chatml", tokenizer).source


def test_a_registered_template_is_found_by_name(tokenizer: Any) -> None:
    templates: dict[str, str] = {}
    register_chat_template("plain", UNMARKED, templates=templates)
    register_chat_template("plain", UNMARKED, templates=templates)
    assert get_chat_template("plain", tokenizer, templates=templates).source == UNMARKED
    with pytest.raises(ValueError, match="another chat template"):
        register_chat_template("plain", COUNTING, templates=templates)
    with pytest.raises(ValueError, match=r'"plain": there are "default" and \[.chatml.\]'):
        get_chat_template("plain", tokenizer)


def test_text_parts_are_the_text_that_they_make(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "their sum?"}]
    turns = [*TURNS[:1], {"role": "user", "content": parts}, *TURNS[2:]]
    assert sft(tokenizer, turns)["input_ids"].equal(sft(tokenizer)["input_ids"])


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "list of at least one message"),
        ("Hello", "list of at least one message"),
        ([{"content": "Hello"}], 'message 1 of "messages" has no "role"'),
        ([{"role": "user", "content": 7}], "message 1 .* neither text nor a list of parts"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "message 1 .* neither text nor a list of parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], "use encode_multimodal_sample"),
        (TURNS[:2], "there is no answer"),
        ([*TURNS, {"role": "assistant", "content": "five " * 600}], r"\d+ tokens, more than max_seq_len=512"),
    ],
)
def test_a_conversation_that_cannot_be_learnt_is_named(tokenizer: Any, messages: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        sft(tokenizer, messages)


def test_plain_text_is_cut_into_pieces_and_nothing_is_lost(tokenizer: Any) -> None:
    text = "Hello there world. " * 9
    pieces = process_pretrain_example({"text": text}, tokenizer, max_seq_len=16)
    assert {len(piece["input_ids"]) for piece in pieces[:-1]} == {16}
    assert all(piece["labels"].equal(piece["input_ids"]) for piece in pieces)
    whole = torch.cat([piece["input_ids"] for piece in pieces])
    assert tokenizer.decode(whole) == text + "<|im_end|>"


def test_empty_text_gives_no_sample_and_a_missing_column_is_named(tokenizer: Any) -> None:
    assert process_pretrain_example({"text": ""}, tokenizer, max_seq_len=16) == []
    with pytest.raises(DataError, match=r'no text in the column "text"; the columns are \[.body.\]'):
        process_pretrain_example({"body": "Hello"}, tokenizer, max_seq_len=16)


@pytest.mark.parametrize("cut", [False, True])
def test_token_ids_are_those_that_the_tokenizer_gives(tokenizer: Any, cut: bool) -> None:
    other = copy.deepcopy(tokenizer)
    if cut:
        other.backend_tokenizer.enable_truncation(3)  # left over from an earlier call
    text = "one two<|im_end|>three  four"
    sample = process_pretrain_example({"text": text}, other)[0]
    assert sample["input_ids"].tolist()[: len(tokenizer(text)["input_ids"])] == tokenizer(text)["input_ids"]
