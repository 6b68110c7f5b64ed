from __future__ import annotations

import json
import random
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from veomni_data import BalancedBuffer, DataError, Outlook, PackingBuffer, Target, attention_cost, deal_rows, pack
from veomni_data import step_target as common_target

CAPACITY = 8192
RANKS = 8
Sample = tuple[int, int]  # number, tokens


def log_normal(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [min(CAPACITY, max(1, int(rng.lognormvariate(5.7146, 1.0)))) for _ in range(count)]


def work(length: int) -> float:
    return attention_cost(length, 1024, causal=False)


def tokens(sample: Sample) -> int:
    return sample[1]


def balanced(size: int = 200) -> BalancedBuffer[Sample]:
    return BalancedBuffer(CAPACITY, size, length=tokens, cost=lambda sample: work(sample[1]))


def steps(buffers: list[Any], lengths: list[int], together: bool) -> list[list[list[Sample]]]:
    """The rows of each step from one buffer a rank, until a part of the samples is used up."""
    parts = [iter([(i, lengths[i]) for i in range(s, len(lengths), len(buffers))]) for s in range(len(buffers))]
    made: list[list[list[Sample]]] = []
    while True:
        more = {"target": common_target([b.outlook() for b in buffers])} if together else {}
        step = []
        for buffer, part in zip(buffers, parts, strict=True):
            row = next((row for row in (buffer.put(sample, **more) for sample in part) if row is not None), None)
            if row is None:
                return made
            step.append(row)
        made.append(step)


def slowest(made: list[list[list[Sample]]]) -> float:
    """How much longer all steps take than if the work of each were equal on all ranks."""
    costs = [[sum(work(length) for _, length in row) for row in step] for step in made]
    return sum(map(max, costs)) / sum(sum(step) / len(step) for step in costs)


def fullness(made: list[list[list[Sample]]]) -> float:
    rows = [row for step in made for row in step]
    return sum(length for row in rows for _, length in row) / (CAPACITY * len(rows))


def test_the_slowest_rank_has_hardly_more_than_the_mean_work_and_rows_are_full() -> None:
    lengths = log_normal(50_000)
    plain = [PackingBuffer[Sample](CAPACITY, 200, length=tokens) for _ in range(RANKS)]
    unbalanced = steps(plain, lengths, together=False)
    made = steps([balanced() for _ in range(RANKS)], lengths, together=True)
    assert slowest(unbalanced) > 1.2
    assert slowest(made) < 1.05
    assert fullness(made) > 0.995
    assert len(made) > 0.95 * len(unbalanced)


def test_buffers_that_do_not_agree_cannot_help_a_long_sample() -> None:
    lengths = log_normal(20_000)
    assert slowest(steps([balanced() for _ in range(RANKS)], lengths, together=False)) > 1.1


def test_no_sample_waits_longer_than_twenty_buffers() -> None:
    lengths, size, waited = log_normal(30_000), 50, 0
    buffer = balanced(size)
    for number, length in enumerate(lengths):
        for arrival, _ in buffer.put((number, length)) or ():
            waited = max(waited, number - arrival)
    assert 2 * size < waited <= 20 * size


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 99)), max_size=60), st.integers(1, 20))
def test_every_sample_is_given_once_in_rows_that_hold_it_whatever_it_costs(
    pairs: list[tuple[int, int]], size: int
) -> None:
    samples = [(number, *pair) for number, pair in enumerate(pairs)]
    buffer: BalancedBuffer[tuple[int, int, int]] = BalancedBuffer(50, size, length=lambda s: s[1], cost=lambda s: s[2])
    rows = [row for row in map(buffer.put, samples) if row is not None] + buffer.flush()
    assert sorted(sample for row in rows for sample in row) == samples
    assert all(sum(sample[1] for sample in row) <= 50 for row in rows)
    assert len(buffer) == 0


def test_rows_stay_within_the_second_limit_too() -> None:
    rng = random.Random(0)
    buffer: BalancedBuffer[tuple[int, int]] = BalancedBuffer(
        100, 20, length=lambda s: s[0], tokens=lambda s: s[1], max_tokens=150, cost=lambda s: s[1] ** 2
    )
    samples = [(targets := rng.randint(1, 50), targets + rng.randint(0, 100)) for _ in range(500)]
    rows = [row for row in map(buffer.put, samples) if row is not None] + buffer.flush()
    assert sum(map(len, rows)) == 500
    assert all(sum(s[0] for s in row) <= 100 and sum(s[1] for s in row) <= 150 for row in rows)


def test_a_heavy_sample_waits_for_a_step_of_heavy_rows() -> None:
    buffer: BalancedBuffer[int] = BalancedBuffer(100, 40, length=int, cost=lambda length: length**2)
    assert [buffer.put(length) for length in [90, *[10] * 30]] == [None] * 31
    assert 90 not in (buffer.pop_row(target=Target(1000.0, 1000.0)) or [90])
    assert buffer.pop_row(target=Target(1000.0, 8200.0)) == [90, 10]


def test_a_heavy_sample_that_waited_long_is_due_and_raises_the_target_of_all() -> None:
    def squares() -> BalancedBuffer[int]:
        return BalancedBuffer(100, 10, length=int, cost=lambda length: length**2)

    waiting, due = squares(), squares()
    for length in [90, *[10] * 80]:
        due.put(length, target=Target(1000.0, 1000.0))
        waiting.put(10)
    assert due.outlook().due > due.outlook().usual
    target = common_target([due.outlook(), waiting.outlook()])
    assert target.cost == due.outlook().due > target.usual
    assert 90 in (due.pop_row(target=target) or ())


def test_the_target_is_the_mean_of_what_is_usual_or_the_dearest_that_is_due() -> None:
    assert common_target([Outlook(10.0, 0.0), Outlook(20.0, 0.0), Outlook(0.0, 0.0)]) == Target(15.0, 15.0)
    assert common_target([Outlook(10.0, 40.0), Outlook(20.0, 30.0)]) == Target(15.0, 40.0)
    assert common_target([Outlook(0.0, 0.0)]) == Target(0.0, 0.0)


@pytest.mark.parametrize("stop", [3, 150, 1200])
def test_a_buffer_goes_on_from_its_state_as_if_nothing_had_happened(stop: int) -> None:
    samples = list(enumerate(log_normal(3000)))
    whole, before, after = balanced(60), balanced(60), balanced(60)
    for sample in samples[:stop]:
        whole.put(sample)
        before.put(sample)
    after.put((99, 1))
    state = json.loads(json.dumps(before.state_dict()))
    after.load_state_dict({**state, "samples": [tuple(sample) for sample in state["samples"]]})
    assert [after.put(s) for s in samples[stop:]] == [whole.put(s) for s in samples[stop:]]
    assert after.outlook() == whole.outlook()
    assert after.flush() == whole.flush()


@pytest.mark.parametrize("cost", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cost_that_is_none_is_refused(cost: float) -> None:
    with pytest.raises(DataError, match="must be a number above 0"):
        BalancedBuffer[int](10, 2, length=int, cost=lambda _: cost).put(3)
    with pytest.raises(DataError, match="a cost above 0 for each of the 2 samples"):
        pack([3, 4], 10, costs=[1.0, cost])
    with pytest.raises(DataError, match="a cost above 0 for each of the 2 samples"):
        pack([3, 4], 10, costs=[1.0])


def test_rows_of_a_list_dealt_in_turn_make_steps_of_equal_work_and_stay_full() -> None:
    lengths = log_normal(10_000)
    costs = [work(length) for length in lengths]
    rows = pack(lengths, CAPACITY, costs=costs)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= CAPACITY for row in rows)
    assert len(rows) <= 1.005 * -(-sum(lengths) // CAPACITY)
    of_rows = [sum(costs[i] for i in row) for row in rows]
    assert of_rows == sorted(of_rows, reverse=True)
    dealt = [of_rows[i : i + RANKS] for i in range(0, len(rows) - RANKS + 1, RANKS)]
    assert sum(map(max, dealt)) < 1.02 * sum(sum(step) / RANKS for step in dealt)
    middle = sorted(of_rows)[len(rows) // 4 : 3 * len(rows) // 4]
    assert middle[-1] < 1.05 * middle[0]
    assert pack(lengths, CAPACITY, costs=costs) == rows


def test_long_samples_that_cannot_be_balanced_are_packed_as_full_as_without_costs() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, CAPACITY) for _ in range(2000)]
    rows = pack(lengths, CAPACITY, costs=[work(length) for length in lengths])
    assert len(rows) == len(pack(lengths, CAPACITY))
    assert pack([], 8, costs=[]) == []


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.randoms(use_true_random=False))
def test_every_rank_gets_as_many_rows_the_dearest_first(ranks: int, each: int, rng: random.Random) -> None:
    costs = [rng.choice([1.0, 2.0, rng.random() * 10]) for _ in range(ranks * each)]
    dealt = deal_rows(costs, ranks, each)
    assert sorted(i for rows in dealt for i in rows) == list(range(ranks * each))
    assert [len(rows) for rows in dealt] == [each] * ranks
    assert all([costs[i] for i in rows] == sorted((costs[i] for i in rows), reverse=True) for rows in dealt)


def test_two_rows_each_are_dealt_as_well_as_they_can_be() -> None:
    rng = random.Random(0)
    for _ in range(20):
        costs = [rng.random() for _ in range(6)]
        best = min(max(sum(costs[i] for i in order[k : k + 2]) for k in (0, 2, 4)) for order in permutations(range(6)))
        assert max(sum(costs[i] for i in rows) for rows in deal_rows(costs, 3, 2)) == best


def test_dealing_evens_out_what_chance_would_not() -> None:
    rng = random.Random(0)
    costs = [rng.lognormvariate(0, 0.5) for _ in range(1024 * 8)]
    dealt = [sum(costs[i] for i in rows) for rows in deal_rows(costs, 1024, 8)]
    in_turn = [sum(costs[i : i + 8]) for i in range(0, len(costs), 8)]
    assert max(dealt) < 1.03 * sum(costs) / 1024 < max(in_turn) / 1.5


def test_rows_that_cannot_be_dealt_evenly_are_refused() -> None:
    with pytest.raises(DataError, match="7 rows cannot be dealt to 4 ranks with 2 rows each"):
        deal_rows([1.0] * 7, 4, 2)


def test_attention_costs_what_the_layers_of_a_token_do_at_twelve_widths() -> None:
    assert attention_cost(12 * 64, 64) == 2 * 12 * 64
    assert attention_cost(6 * 64, 64, causal=False) == 2 * 6 * 64
