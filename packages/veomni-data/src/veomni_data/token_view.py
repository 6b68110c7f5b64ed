"""Rows of tokens as text, with what is learnt and where samples begin: what `inspect` and `replay` show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from .collators import IGNORED_LABEL

_LONGEST_CHARACTER = 8  # tokens that a character may take before it is shown as broken
_SHORTEST_RUN = 3  # placeholders in a row from which on they are shown as one with their number


@dataclass(frozen=True)
class TokenView:
    """A row of T tokens, each with its text.

    Attributes:
        ids: token ids, T.
        texts: T strings that together are the row's text; "" for a token that only begins a character.
        learnt: T, whether the token is a target. The first token of a sample never is: nothing stands before it.
        special: T, whether the token is one that the tokenizer writes as a whole, such as a placeholder.
        starts: the positions at which samples begin, the first of which is 0.
    """

    ids: list[int]
    texts: list[str]
    learnt: list[bool]
    special: list[bool]
    starts: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """How many tokens are learnt."""
        return sum(self.learnt)


class Span(NamedTuple):
    """Tokens [begin, end) that look the same; `repeats` > 1 if they are that often the one token of `text`."""

    begin: int
    end: int
    text: str
    learnt: bool
    special: bool
    repeats: int


def view_sample(sample: Mapping[str, Any], tokenizer: Any) -> TokenView:
    """A sample (`input_ids`, `labels` [T]); its `seq_lens`, if there, say which samples it is made of."""
    ids, labels = (_as_list(sample[key]) for key in ("input_ids", "labels"))
    return _view(ids, labels, _as_list(sample.get("seq_lens") or [len(ids)]), tokenizer)


def view_batch(batch: Mapping[str, Any], tokenizer: Any) -> list[TokenView]:
    """The rows of a micro-batch: packed (`cu_seq_lens_q`, ids [1, T]) or padded (`attention_mask` [B, S])."""
    if "cu_seq_lens_q" in batch:
        lengths = [end - begin for begin, end in pairwise(_as_list(batch["cu_seq_lens_q"]))]
        return [_view(_as_list(batch["input_ids"][0]), _as_list(batch["labels"][0]), lengths, tokenizer)]
    views = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        views.append(_view(_as_list(ids[:length]), _as_list(labels[:length]), [length], tokenizer))
    return views


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds to that of those before it; "" where a character is not whole yet.

    A token alone does not tell its text: many tokenizers put the blank between words into the first of them, and a
    character may be several tokens long. So each is decoded together with the few before it.
    """
    texts: list[str] = []
    begin = read = 0  # the tokens that give the context, and those whose text is out
    before = ""  # the text of ids[begin:read]
    for end in range(1, len(ids) + 1):
        text = _decode(tokenizer, ids[begin:end])
        if text.endswith("\ufffd") and end - read < _LONGEST_CHARACTER and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        begin, read = read, end
        before = _decode(tokenizer, ids[begin:read])
    return texts


def spans(view: TokenView, begin: int = 0, end: int | None = None) -> Iterator[Span]:
    """The tokens [begin, end) of a row cut where they begin to look different, and where a sample begins."""
    end = len(view) if end is None else end
    starts = set(view.starts)
    at = begin
    while at < end:
        stop, token = at + 1, view.ids[at]
        if view.special[at]:
            while stop < end and view.ids[stop] == token and view.learnt[stop] == view.learnt[at]:
                if stop in starts:
                    break
                stop += 1
            stop = stop if stop - at >= _SHORTEST_RUN else at + 1
            yield Span(at, stop, view.texts[at], view.learnt[at], True, stop - at)
        else:
            while stop < end and not view.special[stop] and view.learnt[stop] == view.learnt[at]:
                if stop in starts:
                    break
                stop += 1
            yield Span(at, stop, "".join(view.texts[at:stop]), view.learnt[at], False, 1)
        at = stop


def _view(ids: list[int], labels: list[int], lengths: list[int], tokenizer: Any) -> TokenView:
    starts = [0, *accumulate(lengths)][: len(lengths)]
    whole = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    texts: list[str] = []
    for begin, length in zip(starts, lengths, strict=True):
        texts += token_texts(ids[begin : begin + length], tokenizer)
    firsts = set(starts)
    learnt = [label != IGNORED_LABEL and at not in firsts for at, label in enumerate(labels)]
    return TokenView(ids, texts, learnt, [token in whole for token in ids], starts)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def _as_list(values: Any) -> list[int]:
    return [int(v) for v in values]
