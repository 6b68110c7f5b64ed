"""Rows of samples of one kind."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from veomni_data import BucketBuffer, DataError, build_dataloader

CAPACITY, SIZES = 12, {"small": 2, "wide": 3, "large": 8}
kinds = st.lists(st.sampled_from(sorted(SIZES)), max_size=80)


def buffer(size: int = 10) -> BucketBuffer[tuple[int, str]]:
    return BucketBuffer(CAPACITY, size, bucket=lambda s: s[1], length=lambda s: SIZES[s[1]])


@settings(max_examples=200, deadline=None)
@given(kinds, st.integers(1, 20))
def test_every_sample_comes_once_with_others_of_its_bucket_and_the_oldest_first(names: list[str], size: int) -> None:
    own, rows, held = buffer(size), [], []
    for sample in enumerate(names):
        held.append(sample)
        rows += [row] if (row := own.put(sample)) is not None else []
        if row is not None:
            assert row[0] == held[0]
            held = [s for s in held if s not in row]
    rows += own.flush()
    assert sorted(s for row in rows for s in row) == list(enumerate(names))
    assert all(len({name for _, name in row}) == 1 for row in rows)
    assert all(sum(SIZES[name] for _, name in row) <= CAPACITY for row in rows)
    assert all(row == sorted(row) for row in rows)


@settings(max_examples=50, deadline=None)
@given(kinds, st.integers(0, 80))
def test_a_buffer_goes_on_from_its_state(names: list[str], stop: int) -> None:
    whole, first, second = buffer(), buffer(), buffer()
    samples = list(enumerate(names))
    expected = [whole.put(sample) for sample in samples][stop:] + whole.flush()
    for sample in samples[:stop]:
        first.put(sample)
    second.load_state_dict(first.state_dict())
    assert [second.put(sample) for sample in samples[stop:]] + second.flush() == expected


def pictures() -> list[dict[str, Any]]:
    return [{"input_ids": range(SIZES[name]), "name": name} for name in sorted(SIZES) * 40]


def steps(**options: Any) -> list[list[list[str]]]:
    loader = build_dataloader(
        pictures(),
        micro_batch_size=1,
        global_batch_size=4,
        max_seq_len=CAPACITY,
        buffer_size=24,
        collate=lambda samples: {"names": [sample["name"] for sample in samples]},
        bucket=lambda sample: sample["name"],
        **options,
    )
    return [[batch["names"] for batch in step] for step in loader]


def test_rows_of_the_loader_hold_one_bucket_and_do_not_depend_on_the_number_of_ranks() -> None:
    alone = steps(dp_rank=0, dp_size=1)
    rows = [row for step in alone for row in step]
    assert all(len(set(row)) == 1 for row in rows)
    assert {len(row) for row in rows} >= {CAPACITY // size for size in SIZES.values()}
    assert sum(map(len, rows)) > 0.8 * 120
    dealt = [steps(dp_rank=rank, dp_size=2) for rank in (0, 1)]
    assert [first + second for first, second in zip(*dealt, strict=True)] == alone


def test_a_bucket_needs_packed_rows() -> None:
    with pytest.raises(DataError, match="a bucket is for packed rows"):
        steps(dp_rank=0, dp_size=1, packing=False)
