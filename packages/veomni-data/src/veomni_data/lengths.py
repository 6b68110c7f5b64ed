"""What becomes of a sample that is longer than a row: a named policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .collators import IGNORED_LABEL, TOKEN_KEYS, Sample
from .errors import DataError

TooLong = Literal["drop", "truncate", "split"]
POLICIES: tuple[str, ...] = get_args(TooLong)

_TOKEN_KEYS = (*TOKEN_KEYS, "attention_mask")  # a value a token: [T]


def fit_sample(sample: Sample, max_seq_len: int, policy: TooLong) -> list[Sample]:
    """The sample as samples of at most `max_seq_len` tokens.

    Args:
        sample: `input_ids` and what else there is a value a token, [T]; `position_ids`, [T] or [3, T]; `seq_lens`, if
            it is a row of several samples; and tensors of pictures, video and sound.
        max_seq_len: the most tokens of a row.
        policy: "drop" gives none; "truncate" its beginning; "split" all of it, in pieces whose positions begin at 0
            again. Pictures, video and sound stay together in one piece: a cut is made earlier, just before the first
            of their placeholders, where that is needed.

    Returns:
        `[sample]` itself if it is short enough.

    Raises:
        DataError: placeholders of pictures, video or sound would be cut off from some of the others, or it cannot be
            seen which tokens they are ("placeholders cut"); nothing of what "truncate" leaves is learnt though the
            sample has something to learn ("nothing to learn").
    """
    length = len(sample["input_ids"])
    if length <= max_seq_len:
        return [sample]
    if policy == "drop":
        return []
    first, end = _placeholders(sample, length)
    if policy == "truncate":
        if first < end and end > max_seq_len:
            raise DataError(
                f"the sample has {length} tokens, and cut to max_seq_len={max_seq_len} it would lose placeholders of "
                f"its pictures, video or sound",
                reason="placeholders cut",
            )
        fitted = _cut(sample, 0, max_seq_len, length, keep_media=True)
        if _learns(sample.get("labels")) and not _learns(fitted.get("labels")):
            raise DataError(
                f"the sample has {length} tokens, and of the first max_seq_len={max_seq_len} none is learnt",
                reason="nothing to learn",
            )
        return [fitted]
    if end - first > max_seq_len:
        raise DataError(
            f"the sample has {length} tokens, and the placeholders of its pictures, video or sound do not fit together "
            f"into a piece of max_seq_len={max_seq_len}",
            reason="placeholders cut",
        )
    pieces, begin = [], 0
    while begin < length:
        stop = min(begin + max_seq_len, length)
        if begin < first < stop < end:
            stop = first
        pieces.append(_cut(sample, begin, stop, length, keep_media=begin <= first and end <= stop))
        begin = stop
    return pieces


def _placeholders(sample: Sample, length: int) -> tuple[int, int]:
    """From where to where the placeholders of media lie; (0, 0) without media."""
    media = [k for k in sample if k not in _TOKEN_KEYS and k not in ("position_ids", "seq_lens")]
    if not media:
        return 0, 0
    kinds = sample.get("mm_token_type_ids", sample.get("token_type_ids"))
    places = [] if kinds is None else torch.as_tensor(kinds).nonzero().flatten().tolist()
    if not places:
        raise DataError(
            f'the sample has {length} tokens, too many, and it cannot be cut: which of them belong to its "{media[0]}" '
            f"is not known (mm_token_type_ids)",
            reason="placeholders cut",
        )
    return int(places[0]), int(places[-1]) + 1


def _cut(sample: Sample, begin: int, stop: int, length: int, keep_media: bool) -> Sample:
    """The tokens from `begin` on and before `stop`."""
    piece: Sample = {}
    lengths = _cut_lengths(sample["seq_lens"], begin, stop) if sample.get("seq_lens") is not None else None
    for key, value in sample.items():
        if key in _TOKEN_KEYS:
            piece[key] = value[begin:stop]
        elif key == "seq_lens":
            piece[key] = lengths
        elif key == "position_ids":
            positions = torch.as_tensor(value)[..., begin:stop].clone()
            # only the sample that is cut begins anew: those behind it in the same row do so by themselves
            own = positions[..., : lengths[0] if lengths else stop - begin]
            own -= own[..., :1].clone()
            piece[key] = positions
        elif keep_media:
            piece[key] = value
    return piece


def _cut_lengths(lengths: Sequence[int], begin: int, stop: int) -> list[int]:
    found, at = [], 0
    for length in lengths:
        inside = min(at + int(length), stop) - max(at, begin)
        if inside > 0:
            found.append(inside)
        at += int(length)
    return found


def _learns(labels: Any) -> bool:
    """Whether any token but the first, which nothing stands before, is a target."""
    if labels is None:
        return False
    if isinstance(labels, Tensor):
        return bool((labels[1:] != IGNORED_LABEL).any())
    return any(label != IGNORED_LABEL for label in labels[1:])


def count_targets(sample: Sample) -> int:
    """How many tokens of a sample are learnt."""
    labels = torch.as_tensor(sample["labels"])
    targets = int((labels[1:] != IGNORED_LABEL).sum())
    if sample.get("seq_lens") is None:
        return targets
    # the first token of each sample of a packed row is the target of none
    starts = torch.tensor(list(sample["seq_lens"])).cumsum(0)[:-1]
    return targets - int((labels[starts] != IGNORED_LABEL).sum())
