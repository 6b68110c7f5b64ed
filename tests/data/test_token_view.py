from __future__ import annotations

import io

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from veomni_data import PackingCollator, PaddingCollator, get_chat_template
from veomni_data.terminal import make_console, shown_text, tokens_as_text
from veomni_data.token_view import spans, token_texts, view_batch, view_sample


def chat_sample(tokenizer: PreTrainedTokenizerFast, answer: str) -> dict[str, torch.Tensor]:
    messages = [{"role": "user", "content": "Which digits?"}, {"role": "assistant", "content": answer}]
    ids, labels = get_chat_template("default", tokenizer).encode(messages)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def test_the_texts_of_tokens_are_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<|im_start|>user\nHow are you, Zoë? 你好 🙂\n\n  two  blanks<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_a_character_of_several_tokens_is_shown_with_the_last_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("🙂")["input_ids"]
    assert len(ids) > 1
    assert token_texts(ids, tokenizer) == [""] * (len(ids) - 1) + ["🙂"]


def test_half_a_character_is_shown_as_broken(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("🙂")["input_ids"][:-1]
    assert set("".join(token_texts(ids, tokenizer))) == {"\ufffd"}


def test_a_tokenizer_that_drops_the_first_blank_shows_the_others() -> None:
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁there": 2, "!": 3}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.normalizer = normalizers.Sequence([])
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>")
    assert token_texts([1, 2, 3], tokenizer) == ["Hello", " there", "!"]


def test_what_is_learnt_is_what_the_loss_sees(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [chat_sample(tokenizer, "three"), chat_sample(tokenizer, "five, eight")]
    batch = PackingCollator()(samples)
    (view,) = view_batch(batch, tokenizer)
    # shift_labels[t] is the target of position t, so that token t is learnt if shift_labels[t - 1] is not ignored
    assert view.learnt[1:] == (batch["shift_labels"][0, :-1] != -100).tolist()
    assert view.targets == int((batch["shift_labels"] != -100).sum())
    assert view.starts == [0, len(samples[0]["input_ids"])]
    assert view.texts[view.starts[1] :] == view_sample(samples[1], tokenizer).texts


def test_the_first_token_of_plain_text_is_no_target(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = torch.tensor(tokenizer("Hello there world")["input_ids"])
    view = view_sample({"input_ids": ids, "labels": ids.clone()}, tokenizer)
    assert view.learnt == [False] + [True] * (len(ids) - 1)


def test_padded_rows_are_shown_without_their_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [chat_sample(tokenizer, "three"), chat_sample(tokenizer, "three, five is eight")]
    assert view_batch(PaddingCollator()(samples), tokenizer) == [view_sample(s, tokenizer) for s in samples]


def test_placeholders_in_a_row_are_one_span(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = torch.tensor(tokenizer("a" + "<|pic|>" * 5 + "b")["input_ids"])
    view = view_sample({"input_ids": ids, "labels": torch.full_like(ids, -100)}, tokenizer)
    assert [(span.text, span.repeats) for span in spans(view)] == [("a", 1), ("<|pic|>", 5), ("b", 1)]


def test_a_pipe_gets_marks_around_what_is_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    console = make_console(io.StringIO())
    view = view_sample(chat_sample(tokenizer, "three"), tokenizer)
    text = tokens_as_text(console, view).plain
    assert text == "<|im_start|>user\nWhich digits?<|im_end|>\n<|im_start|>assistant\n\u27e6three<|im_end|>\u27e7\n"


def test_a_terminal_gets_colours_and_no_color_is_respected(tokenizer: PreTrainedTokenizerFast) -> None:
    view = view_sample(chat_sample(tokenizer, "three"), tokenizer)

    def shown(**options: bool) -> str:
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, color_system="standard", **options)  # type: ignore[arg-type]
        console.print(tokens_as_text(console, view))
        return file.getvalue()

    assert "\x1b[1;32mthree" in shown()
    assert "\u27e6" not in shown()
    assert "\u27e6three" in shown(no_color=True)


def test_samples_of_a_row_are_told_apart_and_the_rest_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = PackingCollator()([chat_sample(tokenizer, "three"), chat_sample(tokenizer, "five")])
    (view,) = view_batch(batch, tokenizer)
    text = tokens_as_text(make_console(io.StringIO()), view, most=view.starts[1] + 3).plain
    assert "sample 2 begins" in text
    assert text.endswith(f"... {len(view) - view.starts[1] - 3} more tokens")


def test_data_cannot_move_the_cursor_of_a_terminal() -> None:
    assert shown_text("a\x1b[2Jb\rc\x9bd\u202ee\n\tf") == "a\u241b[2Jb\u240dc\ufffdd\ufffde\n\tf"
