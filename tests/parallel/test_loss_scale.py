from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks
from veomni_parallel import count_targets, global_sum, init_parallel_state, loss_scale


def test_targets_are_counted_over_whole_rows_and_micro_batches() -> None:
    rows = [torch.tensor([[1, -100, 3]]), torch.tensor([[-100, -100], [0, 2]])]
    assert count_targets([{"shift_labels": row} for row in rows]) == 4


def test_a_batch_without_shifted_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r'Micro-batch 1 has no "shift_labels".*input_ids'):
        count_targets([{"shift_labels": torch.zeros(1, 1)}, {"input_ids": torch.zeros(1, 1)}])


def sums() -> dict[str, Any]:
    state = init_parallel_state(ulysses=2)
    rank, large = state.rank, torch.full((2,), 2**40, dtype=torch.int64)
    return {
        "int": global_sum(2**53 + rank, state.loss),
        "float": global_sum(0.1 * rank, state.loss),
        "tensor": global_sum(large + rank, state.loss),
        "given": large,
        "over_rows": global_sum(10**rank, state.dp),
        "scale": loss_scale(state),
    }


def test_sums_are_exact_and_of_the_kind_that_was_given(four_ranks: Ranks) -> None:
    got = four_ranks.run(sums)
    assert all(g["int"] == 4 * 2**53 + 6 and isinstance(g["int"], int) for g in got)
    assert all(g["float"] == got[0]["float"] == pytest.approx(0.6) for g in got)
    assert all(torch.equal(g["tensor"], torch.full((2,), 4 * 2**40 + 6)) for g in got)
    assert all(torch.equal(g["given"], torch.full((2,), 2**40)) for g in got)
    assert [g["over_rows"] for g in got] == [101, 1010, 101, 1010]
    assert all(g["scale"] == 4.0 for g in got)


def test_one_process_sums_to_itself() -> None:
    state = init_parallel_state()
    assert (global_sum(3, state.dp), global_sum(2.5, state.loss), loss_scale(state)) == (3, 2.5, 1.0)
