from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_parallel import init_parallel_state, resolve_sizes


def test_a_size_of_minus_one_is_what_is_left() -> None:
    assert resolve_sizes(16, dp_replicate=2, ulysses=4).dp_shard == 2
    assert resolve_sizes(16, dp_replicate=-1, dp_shard=2, ulysses=4).dp_replicate == 2
    assert resolve_sizes(8, dp_replicate=2, dp_shard=2, ulysses=2).dp == 4


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"ulysses": 3}, ["3 ranks", "dp_shard=-1", "world_size=8", "ulysses=3"]),
        ({"dp_shard": 2, "ulysses": 2}, ["= 4 ranks", "there are 8", "dp_replicate=1"]),
        ({"dp_replicate": -1}, ["dp_replicate and dp_shard are -1"]),
        ({"ulysses": 0}, ["positive", "ulysses=0"]),
    ],
)
def test_impossible_sizes_are_refused_with_all_numbers(sizes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ValueError, match="world_size=8") as error:
        resolve_sizes(8, **sizes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_one_process_without_a_group_answers_like_any_mesh() -> None:
    state = init_parallel_state()
    for mesh in (state.dp, state.fsdp, state.sp, state.loss):
        assert (mesh.size(), mesh.get_local_rank(), mesh.get_group()) == (1, 0, None)
    assert state.device_type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(FrozenInstanceError):
        state.rank = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="there are 1"):
        init_parallel_state(dp_shard=1, ulysses=2)


def members(sizes: dict[str, int]) -> dict[str, Any]:
    state = init_parallel_state(**sizes)
    named = {name: dist.get_process_group_ranks(getattr(state, name).get_group()) for name in ("dp", "sp", "loss")}
    shards = [dist.get_process_group_ranks(group) for group in state.fsdp.get_all_groups()]
    return {**named, "fsdp": shards, "place": (state.dp.get_local_rank(), state.sp.get_local_rank())}


def test_ranks_that_share_a_row_are_neighbours_and_shard_parameters_too(four_ranks: Ranks) -> None:
    got = four_ranks.run(members, {"ulysses": 2})
    assert [g["sp"] for g in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g["dp"] for g in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [g["place"] for g in got] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(g["fsdp"] == [[0, 1, 2, 3]] and g["loss"] == [0, 1, 2, 3] for g in got)


def test_replicas_lie_furthest_apart(four_ranks: Ranks) -> None:
    got = four_ranks.run(members, {"dp_replicate": 2})
    assert [g["fsdp"] for g in got] == [[[0, 2], [0, 1]], [[1, 3], [0, 1]], [[0, 2], [2, 3]], [[1, 3], [2, 3]]]
    assert all(g["dp"] == [0, 1, 2, 3] and len(g["sp"]) == 1 for g in got)


def describe(sizes: dict[str, int]) -> str:
    return init_parallel_state(**sizes).describe()


def test_describe_draws_who_is_with_whom(four_ranks: Ranks) -> None:
    assert four_ranks.run(describe, {"dp_replicate": 2, "dp_shard": 1, "ulysses": 2})[2].splitlines() == [
        "4 ranks on cpu = 2 replicate x 1 shard x 2 ulysses; this is rank 2",
        "  replica 0  shard 0  ranks  0   1",
        "  replica 1  shard 0  ranks [2]  3",
    ]
