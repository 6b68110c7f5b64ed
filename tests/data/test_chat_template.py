"""Templates in the shape of those that models are released with: what is learnt of a conversation by each."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from veomni_data import ChatTemplate, DataError, process_sft_example

TEXT = ["user assistant system model", "What is their sum? three, five is eight.", "Hello there\n\n  world"]

LLAMA_3 = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|start|>ipython<|end|>\n\n' + m.content | tojson + '<|eot|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{{- '<|start|>assistant<|end|>\n\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ '}<|eom|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"""

QWEN_2_5 = """\
{%- if tools %}{{ '<|im_start|>system\nTools:' }}
{%- for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are made up.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- elif m.tool_calls %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for c in m.tool_calls %}{{ '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# reasoning only after the last question, and an empty one where the last answer has none
QWEN_3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set reasoning = m.reasoning_content or '' %}{% set content = m.content or '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}
{{- content }}
{%- for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name + c.function.arguments | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""

# no header of an answer at all; the system prompt stands in the last question
MISTRAL = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}
{%- else %}{% set system, turns = '', messages %}{% endif %}
{%- for m in turns %}
{%- if m.role == 'user' %}
{%- if (loop.index0 % 2) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '[INST] ' }}{% if system and loop.index0 >= (turns | length) - 2 %}{{ system + '\n\n' }}{% endif %}
{{- m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# the generation prompt opens the reasoning, which the text of an answer never has; arguments of calls are text
DEEPSEEK = """\
{{- bos_token }}{% set ns = namespace(tool=false) %}
{%- for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.tool = false %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' and m.content is none %}{% set ns.tool = false %}{{ '<|Assistant|>' }}
{%- for c in m.tool_calls %}{{ '<|call|>' + c.function.name + '\n' + c.function.arguments }}{% endfor %}{{ '<|eos|>' }}
{%- elif m.role == 'assistant' %}
{{- ('' if ns.tool else '<|Assistant|>') + m.content.split('</think>')[-1] + '<|eos|>' }}{% set ns.tool = false %}
{%- elif m.role == 'tool' %}{% set ns.tool = true %}{{ '<|output|>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.tool %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

# loses content that is a text
LLAVA = """\
{%- for m in messages %}{{ m.role | upper + ': ' }}
{%- for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}{{ '</s>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"""

SPECIAL = {
    LLAMA_3: ["<|bos|>", "<|start|>", "<|end|>", "<|eot|>", "<|eom|>"],
    QWEN_2_5: ["<|im_start|>", "<|im_end|>"],
    QWEN_3: ["<|im_start|>", "<|im_end|>"],
    MISTRAL: ["<s>", "</s>", "[INST]", "[/INST]"],
    GEMMA: ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    DEEPSEEK: ["<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>", "<|call|>", "<|output|>"],
    LLAVA: ["<s>", "</s>"],
}


def byte_level(trim: bool = False) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXT * 3, trainer)
    return bpe


def metaspace() -> Tokenizer:
    """As SentencePiece's, with bytes for what it has not seen."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<0x00>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    bpe.train_from_iterator(TEXT * 3, trainer)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return bpe


def template(source: str, make: Callable[[], Tokenizer] = byte_level) -> ChatTemplate:
    tokens = SPECIAL[source]
    inner = make()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    begins = tokens[0] if "b" in tokens[0] or tokens[0] == "<s>" else None
    ends = next((token for token in tokens if token in ("</s>", "<|eos|>")), tokens[-1])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=begins, eos_token=ends)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return ChatTemplate(source, tokenizer)


def said(template: ChatTemplate, row: Any) -> tuple[str, str]:
    row = row if isinstance(row, dict) else {"messages": row}
    sample = process_sft_example(row, template.tokenizer, template)
    ids, labels = sample["input_ids"], sample["labels"]
    assert labels[labels != -100].equal(ids[labels != -100])
    return template.tokenizer.decode(ids), template.tokenizer.decode(ids[labels != -100])


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def call(**arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": arguments}}]


CHAT = [user("What is their sum?"), assistant("eight"), user("there"), assistant("three,\n\nfive ü")]
SYSTEM = [{"role": "system", "content": "Hello"}, *CHAT]
WITH_TOOL = [user("sum?"), assistant(None, tool_calls=call(a=3)), {"role": "tool", "content": "8"}, assistant("eight")]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

TOKENIZERS = [byte_level, lambda: byte_level(trim=True), metaspace]


@pytest.mark.parametrize("make", TOKENIZERS, ids=["bytes", "bytes without blanks", "pieces"])
@pytest.mark.parametrize(
    ("source", "messages", "learnt"),
    [
        (LLAMA_3, SYSTEM, "eight<|eot|>three,\n\nfive ü<|eot|>"),
        (QWEN_2_5, CHAT, "eight<|im_end|>three,\n\nfive ü<|im_end|>"),
        (QWEN_2_5, SYSTEM, "eight<|im_end|>three,\n\nfive ü<|im_end|>"),
        (QWEN_3, SYSTEM, "eight<|im_end|><think>\n\n</think>\n\nthree,\n\nfive ü<|im_end|>"),
        (MISTRAL, CHAT, " eight</s> three,\n\nfive ü</s>"),
        (MISTRAL, SYSTEM[:3], " eight</s>"),
        (GEMMA, CHAT, "eight<end_of_turn>three,\n\nfive ü<end_of_turn>"),
        (DEEPSEEK, SYSTEM, "eight<|eos|>three,\n\nfive ü<|eos|>"),
        (LLAVA, SYSTEM, " eight</s> three,\n\nfive ü</s>"),
    ],
    ids=["llama", "qwen2.5", "qwen2.5 system", "qwen3", "mistral", "mistral system", "gemma", "deepseek", "llava"],
)
def test_what_each_template_has_the_assistant_say_is_learnt(
    source: str, messages: Any, learnt: str, make: Callable[[], Tokenizer]
) -> None:
    text, got = said(template(source, make), messages)
    assert got == learnt
    assert text.count("their sum?") == 1


@pytest.mark.parametrize(
    ("source", "learnt"),
    [
        (LLAMA_3, '{"name": "add", "parameters": {"a": 3}}<|eom|>eight<|eot|>'),
        (QWEN_2_5, '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call><|im_end|>eight<|im_end|>'),
        (QWEN_3, '\n<tool_call>add{"a": 3}<|im_end|><think>\n\n</think>\n\neight<|im_end|>'),
        (DEEPSEEK, '<|call|>add\n{"a": 3}<|eos|>eight<|eos|>'),
    ],
)
def test_calls_of_tools_are_learnt_and_their_results_are_not(source: str, learnt: str) -> None:
    text, got = said(template(source), WITH_TOOL)
    assert got == learnt
    assert "8" in text


def test_the_tools_of_a_row_are_shown_and_a_template_without_them_is_refused() -> None:
    row = {"messages": WITH_TOOL, "tools": TOOLS}
    assert "Tools:\n" in said(template(QWEN_2_5), row)[0]
    with pytest.raises(DataError, match="does not show the tools"):
        said(template(GEMMA), {"messages": CHAT, "tools": TOOLS})
    with pytest.raises(DataError, match="does not show the tool calls of message 2"):
        said(template(LLAVA), [user("sum?"), assistant("three", tool_calls=call(a=3))])


@pytest.mark.parametrize("inline", [False, True])
def test_reasoning_of_the_last_turn_is_learnt_and_an_earlier_turn_without_its_reasoning_is_not(inline: bool) -> None:
    def thought(answer: str) -> dict[str, Any]:
        if inline:
            return assistant(f"<think>\nabout {answer}\n</think>\n\n{answer}")
        return assistant(answer, reasoning_content=f"about {answer}")

    text, learnt = said(template(QWEN_3), [user("Hello"), thought("eight"), user("there"), thought("five")])
    assert learnt == "<think>\nabout five\n</think>\n\nfive<|im_end|>"
    assert "<|im_start|>assistant\neight<|im_end|>" in text
    assert "about eight" not in text


def test_reasoning_on_both_sides_of_a_tool_call_is_learnt() -> None:
    turns = [WITH_TOOL[0], {**WITH_TOOL[1], "reasoning_content": "I add"}, WITH_TOOL[2], WITH_TOOL[3]]
    learnt = said(template(QWEN_3), turns)[1]
    assert learnt.startswith("<think>\nI add\n</think>\n\n\n<tool_call>add")
    assert learnt.endswith("<think>\n\n</think>\n\neight<|im_end|>")


def test_reasoning_that_a_template_never_shows_is_refused() -> None:
    with pytest.raises(DataError, match="does not show the reasoning of message 2"):
        said(template(QWEN_2_5), [user("Hello"), assistant("eight", reasoning_content="about it")])


def test_a_message_of_weight_0_is_not_learnt() -> None:
    turns = [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[2], {**CHAT[3], "weight": 1}]
    for source in (LLAMA_3, QWEN_2_5, DEEPSEEK):
        text, learnt = said(template(source), turns)
        assert learnt.startswith("three")
        assert "eight" in text
        assert "weight" not in text


def test_a_prompt_that_changes_when_others_follow_is_refused_unless_it_is_not_learnt() -> None:
    with pytest.raises(DataError, match=r'message 3 differently .* or give the message "weight": 0'):
        said(template(MISTRAL), SYSTEM)
    assert said(template(MISTRAL), [*SYSTEM[:2], {**SYSTEM[2], "weight": 0}, *SYSTEM[3:]])[1].startswith(" three")


def test_a_template_says_what_it_does_not_take() -> None:
    with pytest.raises(DataError, match="cannot render this conversation: System role not supported"):
        said(template(GEMMA), SYSTEM)
    with pytest.raises(DataError, match="cannot render this conversation: roles must alternate"):
        said(template(MISTRAL), [CHAT[1], *CHAT])
    with pytest.raises(DataError, match=r"cannot render this conversation: .*endfor"):
        said(ChatTemplate("{% for m in messages %}", template(GEMMA).tokenizer), CHAT)


@pytest.mark.parametrize("source", [LLAMA_3, QWEN_2_5, GEMMA, DEEPSEEK])
def test_marks_in_a_template_give_the_masks_that_are_found_without_them(source: str) -> None:
    words = {
        LLAMA_3: ("m.content | trim + '<|eot|>'", None),
        QWEN_2_5: ("m.content + '<|im_end|>", "\\n'"),
        GEMMA: ("m.content | trim + '<end_of_turn>", "\\n'"),
        DEEPSEEK: ("m.content.split('</think>')[-1] + '<|eos|>'", None),
    }[source]
    found = template(source)
    head, end = words
    at = source.rindex(head)
    before, said_, after = source[:at], source[at : at + len(head)], source[at + len(head) :]
    quote = "'" if end else ""
    generated = "{{- " + said_ + quote + " }}"
    block = "{%- if m.role == 'assistant' -%}{%- generation -%}" + generated + "{%- endgeneration -%}"
    block += "{%- else -%}" + generated + "{%- endif -%}"
    before = before.rstrip().removesuffix("+") + "}}"
    rest = "{{- '" + after if end else "{{- ''" + after
    marked = ChatTemplate(before + block + rest, found.tokenizer)
    assert marked.marks_generation
    turns = [{**m, "weight": 0} if weight == 0 else m for m, weight in zip(CHAT, (1, 0, 1, 1), strict=True)]
    for messages in (CHAT, turns):
        for row in ({"messages": messages},):
            ours, theirs = (process_sft_example(row, found.tokenizer, t) for t in (found, marked))
            assert ours["input_ids"].equal(theirs["input_ids"])
            assert ours["labels"].equal(theirs["labels"])


def test_weights_under_marks_that_do_not_match_the_messages_are_refused() -> None:
    twice = "{% for m in messages %}{% for w in m.content.split() %}{% generation %}{{ w }}{% endgeneration %}"
    twice += "{% endfor %}{% endfor %}"
    marked = ChatTemplate(twice, template(GEMMA).tokenizer)
    assert said(marked, CHAT)[1]
    with pytest.raises(DataError, match=r'2 messages .* marks 9 parts .* "weight": 0 cannot be told'):
        said(marked, [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]])


def test_an_answer_that_looks_like_what_surrounds_it_is_still_found() -> None:
    tricky = ["<", "<|Assistant|", "assistant", "think>", "[/INST", "\n", "model\n", "eight\n\n", "  "]
    for source, (question, answer) in itertools.product(
        (LLAMA_3, QWEN_2_5, QWEN_3, GEMMA, DEEPSEEK), itertools.product(tricky[:6], tricky)
    ):
        if not answer.strip():
            continue
        learnt = said(template_of(source), [user(question), assistant(answer), user(answer), assistant(question + "!")])
        ends = {LLAMA_3: "<|eot|>", GEMMA: "<end_of_turn>", DEEPSEEK: "<|eos|>"}.get(source, "<|im_end|>")
        turns = learnt[1].split(ends)
        assert len(turns) == 3
        assert turns[0].strip() == answer.strip()
        assert turns[1].replace("<think>\n\n</think>\n\n", "").strip() == (question + "!").strip()


TEMPLATES_MADE: dict[str, ChatTemplate] = {}


def template_of(source: str) -> ChatTemplate:
    return TEMPLATES_MADE.setdefault(source, template(source))


def test_a_template_goes_to_worker_processes() -> None:
    one = template(DEEPSEEK)
    expected = one.encode(CHAT)
    assert pickle.loads(pickle.dumps(one)).encode(CHAT) == expected


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="Slow cannot tell where in the text a token is"):
        ChatTemplate(GEMMA, Slow())


def test_labels_are_where_the_text_is() -> None:
    sample = process_sft_example({"messages": CHAT}, template_of(GEMMA).tokenizer, template_of(GEMMA))
    learnt = (sample["labels"] != -100).nonzero()[:, 0]
    runs = torch.tensor_split(learnt, (learnt.diff() > 1).nonzero()[:, 0] + 1)
    decode = template_of(GEMMA).tokenizer.decode
    assert [decode(sample["input_ids"][run]) for run in runs] == [
        "eight<end_of_turn>",
        "three,\n\nfive ü<end_of_turn>",
    ]
