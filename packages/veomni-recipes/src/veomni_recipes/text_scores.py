"""How well a language model predicts held-out texts: exact sums over all of their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from veomni_data import DataError

COLUMNS = ("text", "content_split", "content")


@dataclass(frozen=True)
class TextScore:
    """A text under a model.

    Attributes:
        row: which of the held-out samples it is of.
        bytes: of the text in UTF-8.
        tokens: that were predicted: all of the text's, and the end of the text if the tokenizer has a token for it.
        nats: minus the sum of their log-probabilities.
        windows: parts in which the text was read, more than 1 if it is longer than the model sees at once.
        same: whether the tokens stand for exactly this text.
    """

    row: int
    bytes: int
    tokens: int
    nats: float
    windows: int
    same: bool


@dataclass(frozen=True)
class _Window:
    """A part of text number `text`: `inputs` [n], and `targets` [n] of which those before `first` are told already."""

    text: int
    inputs: list[int]
    targets: list[int]
    first: int


def texts_of(row: Mapping[str, Any], key: str | None) -> list[str]:
    """The texts of a row; DataError if there is none."""
    name = key or next((name for name in COLUMNS if row.get(name) is not None), COLUMNS[0])
    found = row.get(name)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        where = getattr(row, "place", "a row")
        raise DataError(f'{where}: there is no text in the column "{name}"; the columns are {sorted(map(str, row))}')
    return [text for text in texts if text]


def windows_of(tokenizer: Any, text: str, number: int, length: int) -> list[_Window]:
    """The windows of a text, of at most `length` tokens; the next one begins in the middle of the one before.

    Each token is predicted once: in the first window that it is in, so from at least half a window of tokens before it,
    but for the text's first ones. The first is predicted from the start-of-text token, or without one from the
    end-of-text token.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = end if start is None else start
    if start is None:
        raise DataError(
            "the tokenizer has neither a start-of-text nor an end-of-text token to predict a text's first by"
        )
    ids = [start, *ids, *([] if end is None else [end])]
    windows, told = [], 0
    for begin in range(0, len(ids), max(1, length // 2)):
        stop = min(begin + length, len(ids) - 1)
        if stop <= told:
            break
        windows.append(_Window(number, ids[begin:stop], ids[begin + 1 : stop + 1], told - begin))
        told = stop
    return windows


@torch.no_grad()
def score_texts(
    model: Any, tokenizer: Any, texts: Sequence[tuple[int, str]], *, length: int, batch_size: int
) -> list[TextScore]:
    """The scores of texts, each with the number of its row.

    Args:
        model: of transformers, not sharded, with the `loss` of `use_log_probs`.
        tokenizer: of the model.
        texts: numbers of rows, and texts.
        length: tokens that the model sees at once.
        batch_size: windows that are computed together, padded on the right, which a causal model does not see.
    """
    windows = [w for number, (_, text) in enumerate(texts) for w in windows_of(tokenizer, text, number, length)]
    nats, tokens, parts = [0.0] * len(texts), [0] * len(texts), [0] * len(texts)
    for at in range(0, len(windows), batch_size):
        group = windows[at : at + batch_size]
        width = max(len(window.inputs) for window in group)
        inputs = torch.zeros(len(group), width, dtype=torch.int64)
        targets = torch.full((len(group), width), -100)
        for row, window in enumerate(group):
            inputs[row, : len(window.inputs)] = torch.tensor(window.inputs)
            targets[row, window.first : len(window.targets)] = torch.tensor(window.targets[window.first :])
        inputs, targets = inputs.to(model.device), targets.to(model.device)
        found = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss.double().sum(1)
        for window, value, count in zip(group, found.tolist(), (targets != -100).sum(1).tolist(), strict=True):
            nats[window.text] -= value
            tokens[window.text] += count
            parts[window.text] += 1
    return [
        TextScore(row, len(text.encode()), tokens[number], nats[number], parts[number], _same(tokenizer, text))
        for number, (row, text) in enumerate(texts)
    ]


def _same(tokenizer: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def summarize_texts(scores: Sequence[TextScore]) -> dict[str, float]:
    """Sums over all texts: `loss` (nats a token), `perplexity`, `bits_per_byte`, and counts.

    `bits_per_byte` is the nats of all tokens, divided by ln 2 and the UTF-8 bytes of the texts; the ends of texts cost
    nats but are no bytes.
    """
    nats, tokens, size = (sum(getattr(score, key) for score in scores) for key in ("nats", "tokens", "bytes"))
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(700.0, nats / tokens)),
        "bits_per_byte": nats / math.log(2) / size,
        "texts": len(scores),
        "tokens": tokens,
        "bytes": size,
        "read_in_windows": sum(score.windows > 1 for score in scores),
        "changed_by_tokenizer": sum(not score.same for score in scores),
    }


def lines_of(scores: Sequence[TextScore]) -> list[dict[str, Any]]:
    """A line for each text, with its bits per byte."""
    return [{**asdict(score), "bits_per_byte": score.nats / math.log(2) / score.bytes} for score in scores]
