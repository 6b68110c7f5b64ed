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
        ({"dp_shard": 2, "ulysses": 2}, ["= 4 ranks", "there are 8", "dp_replicate=1", "tp=1"]),
        ({"dp_replicate": -1}, ["dp_replicate and dp_shard are -1"]),
        ({"ulysses": 0}, ["positive", "ulysses=0"]),
        ({"ep": -1}, ["positive", "ep=-1"]),
        ({"tp": 3}, ["3 ranks", "dp_shard=-1", "tp=3"]),
        ({"dp_replicate": 2, "tp": 2, "ep": 8}, ["ep=8 does not divide the 4 ranks of one replica", "tp=2"]),
    ],
)
def test_impossible_sizes_are_refused_with_all_numbers(sizes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ValueError, match="world_size=8") as error:
        resolve_sizes(8, **sizes)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(("name", "instead"), [("cp", "ulysses"), ("pp", "dp_shard or tp")])
def test_context_and_pipeline_sizes_are_one_until_they_are_built(name: str, instead: str) -> None:
    assert resolve_sizes(8, **{name: 1}).dp_shard == 8
    with pytest.raises(ValueError, match=f"not built yet, so {name}=2 must be 1; use {instead}"):
        resolve_sizes(8, **{name: 2})


def test_experts_lie_across_all_ranks_of_a_replica() -> None:
    sizes = resolve_sizes(32, dp_replicate=2, ulysses=2, tp=2, ep=8)
    assert (sizes.dp_shard, sizes.dp, sizes.ep_fsdp) == (4, 8, 2)
    assert resolve_sizes(32).ep_fsdp == 1


def test_one_process_without_a_group_answers_like_any_mesh() -> None:
    state = init_parallel_state()
    for mesh in (state.dp, state.fsdp, state.sp, state.tp, state.pp, state.ep, state.ep_fsdp, state.loss):
        assert (mesh.size(), mesh.get_local_rank(), mesh.get_group()) == (1, 0, None)
    assert state.device_type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(FrozenInstanceError):
        state.rank = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="there are 1"):
        init_parallel_state(dp_shard=1, ulysses=2)


VIEWS = ("dp", "replicate", "fsdp", "sp", "tp", "pp", "ep", "ep_fsdp", "loss")


def members(sizes: dict[str, int]) -> dict[str, Any]:
    state = init_parallel_state(**sizes)
    views = {name: getattr(state, name) for name in VIEWS}
    found = {name: dist.get_process_group_ranks(mesh.get_group()) for name, mesh in views.items()}
    for name, mesh in views.items():
        assert found[name][mesh.get_local_rank()] == state.rank
        assert len(found[name]) == mesh.size()
    return found


def test_ranks_that_share_a_row_are_neighbours_and_shard_parameters_too(four_ranks: Ranks) -> None:
    got = four_ranks.run(members, {"ulysses": 2})
    assert [g["sp"] for g in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g["dp"] for g in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(g["fsdp"] == [0, 1, 2, 3] and g["loss"] == [0, 1, 2, 3] for g in got)


def test_replicas_lie_furthest_apart(four_ranks: Ranks) -> None:
    got = four_ranks.run(members, {"dp_replicate": 2})
    assert [g["fsdp"] for g in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g["replicate"] for g in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(g["dp"] == [0, 1, 2, 3] and len(g["sp"]) == 1 for g in got)


def test_ranks_that_share_a_matrix_are_closest_and_hold_the_same_tokens(four_ranks: Ranks) -> None:
    got = four_ranks.run(members, {"tp": 2})
    assert [g["tp"] for g in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(g[name] == [[0, 2], [1, 3]][rank % 2] for rank, g in enumerate(got) for name in ("dp", "fsdp", "loss"))
    got = four_ranks.run(members, {"tp": 2, "ulysses": 2})
    assert [g["sp"] for g in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(len(g["dp"]) == 1 for g in got)


@pytest.mark.parametrize("inner", [{}, {"ulysses": 2}, {"tp": 2}])
def test_ranks_with_different_experts_are_neighbours_whatever_else_they_share(
    inner: dict[str, int], four_ranks: Ranks
) -> None:
    got = four_ranks.run(members, {"ep": 2, **inner})
    assert [g["ep"] for g in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g["ep_fsdp"] for g in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_experts_are_not_shared_by_replicas(four_ranks: Ranks) -> None:
    got = four_ranks.run(members, {"ep": 2, "dp_replicate": 2})
    assert [g["ep"] for g in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(len(g["ep_fsdp"]) == 1 for g in got)


def groups_made(sizes: dict[str, int]) -> int:
    before = len(dist.distributed_c10d._world.pg_map)
    init_parallel_state(**sizes)
    return len(dist.distributed_c10d._world.pg_map) - before


def test_ranks_that_are_together_under_two_names_share_a_process_group(four_ranks: Ranks) -> None:
    for sizes, most in (({}, 2), ({"ulysses": 2}, 4), ({"tp": 2}, 4), ({"ep": 2, "dp_replicate": 2}, 7)):
        assert max(four_ranks.run(groups_made, sizes)) <= most


def sentence(options: dict[str, int]) -> str:
    try:
        init_parallel_state(**options)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_groups_that_would_cross_nodes_are_refused_where_nodes_are_known(four_ranks: Ranks) -> None:
    got = four_ranks.run(sentence, {"tp": 2, "ulysses": 2, "node_size": 2})
    assert all("tp=2 x ulysses=2 ranks do not fit into nodes of node_size=2" in text for text in got)
    assert four_ranks.run(sentence, {"tp": 2, "node_size": 2}) == ["accepted"] * 4


def describe(sizes: dict[str, int]) -> str:
    return init_parallel_state(**sizes).describe()


def test_describe_draws_who_is_with_whom(four_ranks: Ranks) -> None:
    assert four_ranks.run(describe, {"dp_replicate": 2, "dp_shard": 1, "ulysses": 2})[2].splitlines() == [
        "4 ranks on cpu = 2 replicate x 1 shard x 2 ulysses; this is rank 2",
        "  replica 0  shard 0  ranks  0   1",
        "  replica 1  shard 0  ranks [2]  3",
    ]
    outside = four_ranks.run(describe, {"ep": 2, "ep_outside": True})[2].splitlines()
    assert outside[-2:] == [
        "  replica 0  ep_fsdp 0  experts over  0  [2]",
        "  replica 0  ep_fsdp 1  experts over  1   3",
    ]
    assert four_ranks.run(describe, {"tp": 2, "ep": 2})[2].splitlines() == [
        "4 ranks on cpu = 1 replicate x 2 shard x 1 ulysses x 2 tp, experts over 2 ep x 2 ep_fsdp; this is rank 2",
        "  replica 0  shard 0  ranks (0   1)",
        "  replica 0  shard 1  ranks ([2]  3)",
        "  replica 0  ep_fsdp 0  experts over  0   1",
        "  replica 0  ep_fsdp 1  experts over [2]  3",
    ]
