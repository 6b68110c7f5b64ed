"""Towers of multimodal models: ranks of a row share its pictures and sounds, and no rank waits for another's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from veomni_parallel import (
    ParallelError,
    apply_packed_attention,
    build_parallelize_model,
    init_parallel_state,
    leak_probe,
    share_towers,
)
from veomni_parallel.tower_sharing import deal, deal_groups, empty_input, find_items, find_towers, take_items

from tests.parallel.multimodal import (
    MODELS,
    build_multimodal,
    count,
    multimodal_loss,
    multimodal_samples,
    multimodal_truth,
    pack_multimodal,
)
from tests.parallel.parity import Gradients, worst
from tests.parallel.parity import gradients_of as whole_gradients

TOLERANCE = 1e-5


def assert_true(name: str, loss: float, gradients: Gradients, skip: tuple[str, ...] = ()) -> None:
    expected, reference = multimodal_truth(name, skip)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    difference, where = worst(gradients, reference)
    assert difference <= TOLERANCE, f"{where} is off by {difference:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_on_one_process_is_its_samples_alone(name: str) -> None:
    model, data = build_multimodal(name), multimodal_samples(name)
    model = build_parallelize_model(model, init_parallel_state())
    row = pack_multimodal(data)
    loss = multimodal_loss(model, row, row["shift_labels"], count(data))
    loss.backward()
    assert_true(name, loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def sliced(name: str, mode: str) -> dict[str, Any]:
    """The whole row on every rank; how many items each tower computed here."""
    state = init_parallel_state(dp_shard=1, ulysses=-1)
    model, data = build_multimodal(name), multimodal_samples(name)
    computed: list[int] = []
    for tower in find_towers(model).values():
        first = next(child for child in tower.modules() if isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d))
        first.register_forward_hook(lambda module, args, output: computed.append(len(output)))
    model = build_parallelize_model(model, state, mode=mode)
    row = pack_multimodal(data)
    targets = row["shift_labels"].tensor_split(state.sp.size(), dim=1)[state.sp.get_local_rank()]
    loss = multimodal_loss(model, row, targets, count(data))
    (loss * state.loss.size()).backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed)
    gradients = whole_gradients(model)
    return {"loss": summed.item(), "gradients": gradients if state.rank == 0 else {}, "computed": computed}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_share_a_row_and_its_pictures(name: str, two_ranks: Ranks) -> None:
    first, second = two_ranks.run(sliced, name, "ddp")
    assert_true(name, first["loss"], first["gradients"])
    if MODELS[name][3] == {"image"}:
        # (4 + 2) + 2 + 1 | (6 + 2) of 17 merged patches, each of four; the one video goes to the first, and the second
        # runs its tower for nothing
        assert first["computed"] == [36, 16]
        assert second["computed"] == [32, 16]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("qwen3_vl", "qwen2_5_omni") else pytest.mark.slow) for n in MODELS]
)
def test_four_ranks_share_a_row_and_its_pictures(name: str, four_ranks: Ranks) -> None:
    assert_true(name, *[four_ranks.run(sliced, name, "fsdp2")[0][key] for key in ("loss", "gradients")])


def uneven(name: str, mode: str, ulysses: int, leave_out: dict[int, tuple[str, ...]]) -> tuple[float, Gradients]:
    """Data-parallel ranks of which some have no pictures or no sounds in their row."""
    state = init_parallel_state(ulysses=ulysses)
    model = build_parallelize_model(build_multimodal(name), state, mode=mode)
    own, total = samples_of(name, state.dp.size(), leave_out)
    row = pack_multimodal(own[state.dp.get_local_rank()])
    targets = row["shift_labels"].tensor_split(state.sp.size(), dim=1)[state.sp.get_local_rank()]
    loss = multimodal_loss(model, row, targets, total)
    (loss * state.loss.size()).backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed)
    gradients = whole_gradients(model)
    return summed.item(), gradients if state.rank == 0 else {}


def samples_of(name: str, size: int, leave_out: dict[int, tuple[str, ...]]) -> tuple[list[list[Any]], int]:
    rows = [multimodal_samples(name, leave_out.get(rank, ()))[rank::size] for rank in range(size)]
    return rows, sum(count(row) for row in rows)


def uneven_truth(name: str, size: int, leave_out: dict[int, tuple[str, ...]]) -> tuple[float, Gradients]:
    model, loss = build_multimodal(name), 0.0
    rows, total = samples_of(name, size, leave_out)
    for sample in [sample for row in rows for sample in row]:
        alone = {key: value for key, value in pack_multimodal([sample]).items() if not key.startswith(("cu_", "max_"))}
        one = multimodal_loss(model, alone, sample["shift_labels"], total)
        one.backward()
        loss += one.item()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["fsdp2", "fsdp1", "ddp"])
@pytest.mark.parametrize(
    "leave_out",
    [{0: ("image",)}, {1: ("image", "audio")}, {0: ("audio",), 1: ("image",)}, {0: ("image",), 1: ("audio",)}],
    ids=str,
)
def test_a_rank_without_pictures_or_sounds_keeps_step(
    leave_out: dict[int, tuple[str, ...]], mode: str, two_ranks: Ranks
) -> None:
    loss, gradients = two_ranks.run(uneven, "qwen2_5_omni", mode, 1, leave_out)[0]
    expected, reference = uneven_truth("qwen2_5_omni", 2, leave_out)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    difference, where = worst(gradients, reference)
    assert difference <= TOLERANCE, f"{where} is off by {difference:.1e}"


@pytest.mark.parametrize("name", ["qwen3_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_ranks_of_a_row_without_pictures_keep_step_with_other_rows(name: str, four_ranks: Ranks) -> None:
    leave_out = {1: ("image", "square")}
    loss, gradients = four_ranks.run(uneven, name, "fsdp2", 2, leave_out)[0]
    expected, reference = uneven_truth(name, 2, leave_out)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    difference, where = worst(gradients, reference)
    assert difference <= TOLERANCE, f"{where} is off by {difference:.1e}"


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_omni", "gemma3"])
def test_samples_with_pictures_do_not_leak(name: str) -> None:
    model = build_multimodal(name)
    row = {key: value for key, value in pack_multimodal(multimodal_samples(name)).items() if key != "shift_labels"}
    if name != "gemma3":
        assert leak_probe(model, row).leaks  # with positions of M-RoPE plain models build one mask for all samples
    apply_packed_attention(model)
    assert leak_probe(model, row).same_bits


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([5], 3, [1, 0, 0]),
        ([1, 9, 1, 1], 2, [2, 2]),
        ([9, 1, 1, 1], 2, [1, 3]),
        ([3, 3, 3, 3, 3], 4, [2, 2, 1, 0]),
    ],
)
def test_items_are_dealt_to_neighbours_with_the_least_largest_share(
    sizes: list[int], ranks: int, expected: list[int]
) -> None:
    runs = deal(sizes, ranks)
    assert [run.stop - run.start for run in runs] == expected
    assert [index for run in runs for index in range(run.start, run.stop)] == list(range(len(sizes)))


def test_items_of_a_group_stay_together() -> None:
    runs = deal_groups([4, 1, 1, 4], torch.tensor([0, 0, 2, 3]), 2)
    assert [(run.start, run.stop) for run in runs] == [(0, 2), (2, 4)]


def test_items_are_told_by_grids_lengths_or_the_batch() -> None:
    grids = {"x": torch.zeros(12, 5), "grid_thw": torch.tensor([[1, 2, 2], [2, 2, 2]])}
    assert find_items(grids).sizes == (4, 8)  # type: ignore[union-attr]
    assert take_items(grids, find_items(grids), slice(1, 2))["x"].shape == (8, 5)  # type: ignore[arg-type]
    sounds = {"x": torch.zeros(5, 12), "feature_lens": torch.tensor([7, 5]), "other": [1, 2]}
    taken = take_items(sounds, find_items(sounds), slice(0, 1))  # type: ignore[arg-type]
    assert taken["x"].shape == (5, 7)
    assert taken["other"] == [1]
    assert find_items({"pixel_values": torch.zeros(3, 3, 4, 4), "flag": True}).sizes == (1, 1, 1)  # type: ignore[union-attr]
    assert find_items({"x": torch.zeros(12, 5)}) is None
    assert find_items({"x": torch.zeros(12, 5), "lens": torch.tensor([7, 4])}) is None
    assert find_items({"pixel_values": torch.zeros(3, 3, 4, 4), "image_sizes": torch.full((3, 2), 4)}) is None


@pytest.mark.parametrize("name", MODELS)
def test_every_tower_can_be_given_nothing(name: str) -> None:
    for tower in find_towers(build_multimodal(name)).values():
        assert tower(**empty_input(tower)) is not None


def test_a_tower_whose_input_is_unknown_is_named() -> None:
    tower = next(iter(find_towers(build_multimodal("gemma3")).values()))
    tower.config = SimpleNamespace()
    with pytest.raises(ParallelError, match=r"SiglipVisionModel.*give each rank a row with one"):
        empty_input(tower)


def test_one_rank_alone_computes_all() -> None:
    model = build_multimodal("qwen3_vl")
    forward = model.model.visual.forward
    share_towers(model, init_parallel_state().sp)
    assert model.model.visual.forward == forward
