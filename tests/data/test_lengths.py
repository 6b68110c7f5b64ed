from __future__ import annotations

from typing import Any

import pytest
import torch
from veomni_data import DataError, fit_sample

from tests.data.loading import loader, samples


def sample(length: int, **more: Any) -> dict[str, Any]:
    ids = torch.arange(length)
    return {"input_ids": ids, "labels": ids.clone(), **more}


def with_picture(length: int, first: int, end: int) -> dict[str, Any]:
    kinds = torch.zeros(length, dtype=torch.int64)
    kinds[first:end] = 1
    return sample(length, mm_token_type_ids=kinds, pixel_values=torch.ones(end - first, 3))


@pytest.mark.parametrize("policy", ["drop", "truncate", "split"])
def test_a_sample_that_fits_stays_what_it_is(policy: Any) -> None:
    given = sample(8)
    assert fit_sample(given, 8, policy)[0] is given


def test_each_policy_does_what_it_is_called() -> None:
    assert fit_sample(sample(9), 8, "drop") == []
    (truncated,) = fit_sample(sample(9), 8, "truncate")
    assert truncated["input_ids"].tolist() == truncated["labels"].tolist() == list(range(8))
    pieces = fit_sample(sample(20), 8, "split")
    assert [piece["input_ids"].tolist() for piece in pieces] == [list(range(8)), list(range(8, 16)), [16, 17, 18, 19]]
    lists = fit_sample({"input_ids": list(range(9)), "labels": list(range(9))}, 8, "split")
    assert [piece["labels"] for piece in lists] == [list(range(8)), [8]]


def test_positions_of_a_piece_begin_at_zero() -> None:
    positions = torch.stack([torch.arange(20), torch.arange(20) * 2, torch.arange(20) + 5])
    pieces = fit_sample(sample(20, position_ids=positions), 8, "split")
    assert [piece["position_ids"].shape for piece in pieces] == [(3, 8), (3, 8), (3, 4)]
    assert pieces[1]["position_ids"].tolist() == [list(range(8)), list(range(0, 16, 2)), list(range(8))]
    assert positions[0].tolist() == list(range(20))


def test_a_row_of_several_samples_keeps_their_lengths() -> None:
    row = sample(20, seq_lens=[6, 6, 8], position_ids=torch.tensor([*range(6), *range(6), *range(8)]))
    pieces = fit_sample(row, 8, "split")
    assert [piece["seq_lens"] for piece in pieces] == [[6, 2], [4, 4], [4]]
    assert pieces[1]["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert fit_sample(row, 8, "truncate")[0]["seq_lens"] == [6, 2]


def test_pictures_stay_whole_and_with_their_placeholders() -> None:
    (truncated,) = fit_sample(with_picture(20, 2, 6), 8, "truncate")
    assert truncated["pixel_values"].shape == (4, 3)
    assert truncated["mm_token_type_ids"].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    pieces = fit_sample(with_picture(20, 6, 12), 8, "split")
    assert [len(piece["input_ids"]) for piece in pieces] == [6, 8, 6]
    assert ["pixel_values" in piece for piece in pieces] == [False, True, False]
    assert sum(int(piece["mm_token_type_ids"].sum()) for piece in pieces) == 6


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        (with_picture(20, 6, 12), "truncate"),
        (with_picture(20, 10, 12), "truncate"),
        (with_picture(20, 4, 16), "split"),
        (sample(20, pixel_values=torch.ones(4, 3)), "truncate"),
        (sample(20, pixel_values=torch.ones(4, 3)), "split"),
    ],
)
def test_a_picture_is_never_cut(given: dict[str, Any], policy: Any) -> None:
    with pytest.raises(DataError, match="the sample has 20 tokens") as raised:
        fit_sample(given, 8, policy)
    assert raised.value.reason == "placeholders cut"


def test_what_is_left_of_an_answer_must_be_something() -> None:
    given = sample(20)
    given["labels"][:12] = -100
    with pytest.raises(DataError, match="of the first max_seq_len=8 none is learnt") as raised:
        fit_sample(given, 8, "truncate")
    assert raised.value.reason == "nothing to learn"
    assert len(fit_sample(given, 8, "split")) == 3


@pytest.mark.parametrize("packing", [True, False])
def test_the_loader_counts_what_it_does_with_long_samples(packing: bool) -> None:
    data = samples()
    for long in (7, 90, 200):
        data[long] = {"input_ids": [1000 + i for i in range(150)], "labels": [1000 + i for i in range(150)]}
    tokens = sum(len(s["input_ids"]) for s in data)
    for policy, lost in (("drop", 450), ("truncate", 3 * 86), ("split", 0)):
        each = loader(data, too_long=policy, packing=packing, drop_last=False)
        batches = [batch for step in each for batch in step]
        given = sum(int((batch["input_ids"] > 0).sum()) for batch in batches)
        assert given == tokens - lost
        counts = each.counts()
        fates = {"drop": "dropped", "truncate": "truncated", "split": "split"}
        assert {fate: counts[fate] for fate in fates.values()} == {
            fate: 3 * (fate == fates[policy]) for fate in fates.values()
        }
        assert counts["seen"] == 300
        assert counts["tokens"]["data"] == given
