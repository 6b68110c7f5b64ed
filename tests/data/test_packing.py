from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from veomni_data import DataError, PackingBuffer, pack

CAPACITY = 50
lists_of_lengths = st.lists(st.integers(1, CAPACITY), max_size=60)


def log_normal(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [min(8192, max(1, int(rng.lognormvariate(5.7, 1.0)))) for _ in range(count)]


@settings(max_examples=200, deadline=None)
@given(lists_of_lengths)
def test_pack_puts_every_sample_in_one_row_that_holds_it(lengths: list[int]) -> None:
    rows = pack(lengths, CAPACITY)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= CAPACITY for row in rows)


@settings(max_examples=200, deadline=None)
@given(lists_of_lengths)
def test_pack_is_best_fit_decreasing(lengths: list[int]) -> None:
    left, expected = sorted(lengths), []
    while left:
        row, room = [], CAPACITY
        while fitting := [length for length in left if length <= room]:
            row.append(fitting[-1])
            left.remove(fitting[-1])
            room -= fitting[-1]
        expected.append(row)
    assert [[lengths[i] for i in row] for row in pack(lengths, CAPACITY)] == expected


def test_pack_reaches_the_lower_bound_on_real_lengths() -> None:
    lengths = log_normal(20_000)
    assert len(pack(lengths, 8192)) == -(-sum(lengths) // 8192)


@pytest.mark.parametrize(("length", "capacity"), [(51, 50), (0, 50)])
def test_a_sample_that_fits_no_row_is_named(length: int, capacity: int) -> None:
    with pytest.raises(DataError, match=f"sample 2 has {length} tokens: it must have 1 to 50"):
        pack([7, 50, length, 3], capacity)
    with pytest.raises(DataError, match=f"a sample has {length} tokens"):
        PackingBuffer(capacity, 4, length=int).put(length)


@settings(max_examples=200, deadline=None)
@given(lists_of_lengths, st.integers(1, 20))
def test_a_buffer_gives_every_sample_once_in_rows_that_hold_it(lengths: list[int], size: int) -> None:
    samples = list(enumerate(lengths))
    buffer: PackingBuffer[tuple[int, int]] = PackingBuffer(CAPACITY, size, length=lambda sample: sample[1])
    rows = [row for row in map(buffer.put, samples) if row is not None] + buffer.flush()
    assert sorted(sample for row in rows for sample in row) == samples
    assert all(sum(length for _, length in row) <= CAPACITY for row in rows)
    assert len(buffer) == 0


def test_a_row_starts_with_the_oldest_sample_and_goes_on_with_the_largest_that_fits() -> None:
    buffer: PackingBuffer[int] = PackingBuffer(10, 5, length=int)
    assert [buffer.put(length) for length in (3, 4, 6, 7)] == [None] * 4
    assert buffer.put(2) == [3, 7]
    assert buffer.put(1) is None
    assert buffer.flush() == [[4, 6], [2, 1]]


def test_no_sample_waits_for_long() -> None:
    lengths, size = log_normal(30_000), 200
    buffer: PackingBuffer[tuple[int, int]] = PackingBuffer(8192, size, length=lambda sample: sample[1])
    waited = 0
    for number, length in enumerate(lengths):
        for arrival, _ in buffer.put((number, length)) or ():
            waited = max(waited, number - arrival)
    assert waited <= 20 * size


def test_a_stream_fills_its_rows() -> None:
    buffer: PackingBuffer[int] = PackingBuffer(8192, 200, length=int)
    rows = [row for row in map(buffer.put, log_normal(30_000)) if row is not None]
    assert sum(map(sum, rows)) >= 0.9995 * 8192 * len(rows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, CAPACITY), min_size=10, max_size=80), st.integers(0, 10))
def test_a_buffer_goes_on_from_its_state_as_if_nothing_had_happened(lengths: list[int], stop: int) -> None:
    def stream() -> PackingBuffer[list[int]]:
        return PackingBuffer(CAPACITY, 6, length=lambda sample: sample[1])

    samples = [[number, length] for number, length in enumerate(lengths)]
    whole, before = stream(), stream()
    for sample in samples[:stop]:
        whole.put(sample)
        before.put(sample)
    after = stream()
    after.put([99, 1])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert [after.put(s) for s in samples[stop:]] == [whole.put(s) for s in samples[stop:]]
    assert after.flush() == whole.flush()


def test_a_row_of_less_capacity_starts_with_the_oldest_sample_even_if_it_is_longer() -> None:
    buffer: PackingBuffer[int] = PackingBuffer(10, 3, length=int)
    assert [buffer.put(length) for length in (7, 1)] == [None, None]
    assert buffer.put(2, capacity=4) == [7]
    assert buffer.put(3, capacity=4) == [1, 3]
    assert buffer.pop_row(capacity=1) == [2]


def test_a_row_is_ready_when_the_capacity_of_that_row_is_held() -> None:
    small, large = PackingBuffer[int](10, 2, length=int), PackingBuffer[int](10, 2, length=int)
    assert [small.put(2, capacity=4) for _ in range(2)] == [None, [2, 2]]
    assert [large.put(2) for _ in range(5)] == [None, None, None, None, [2] * 5]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, CAPACITY), st.integers(0, 40)), max_size=60), st.integers(1, 20))
def test_rows_counted_in_targets_stay_within_both_limits(pairs: list[tuple[int, int]], size: int) -> None:
    samples = [(number, targets, targets + prompt) for number, (targets, prompt) in enumerate(pairs)]
    buffer: PackingBuffer[tuple[int, int, int]] = PackingBuffer(
        CAPACITY, size, length=lambda sample: sample[1], tokens=lambda sample: sample[2], max_tokens=90
    )
    rows = [row for row in map(buffer.put, samples) if row is not None] + buffer.flush()
    assert sorted(sample for row in rows for sample in row) == samples
    for row in rows:
        assert sum(sample[1] for sample in row) <= CAPACITY
        assert sum(sample[2] for sample in row) <= 90


def test_samples_of_many_tokens_and_few_targets_make_a_row_before_the_targets_fill_one() -> None:
    buffer: PackingBuffer[tuple[int, int]] = PackingBuffer(
        100, 2, length=lambda sample: sample[0], tokens=lambda sample: sample[1], max_tokens=150
    )
    assert buffer.put((1, 80)) is None
    assert buffer.put((1, 80)) == [(1, 80)]
    with pytest.raises(DataError, match="a sample has 151 tokens: a row holds at most 150"):
        buffer.put((1, 151))


def test_the_limit_of_tokens_follows_the_capacity_of_a_row() -> None:
    buffer: PackingBuffer[tuple[int, int]] = PackingBuffer(
        100, 9, length=lambda sample: sample[0], tokens=lambda sample: sample[1], max_tokens=150
    )
    for _ in range(3):
        buffer.put((10, 30))
    assert buffer.pop_row(capacity=50) == [(10, 30)] * 2
