"""Weights that have drifted apart and gradients that are not finite are named, with their ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.distributed.tensor import DTensor
from veomni_parallel import build_parallelize_model, find_nonfinite, init_parallel_state, sync_check

from tests.parallel.mixtures import build as build_mixture
from tests.parallel.parity import build, pack, samples

NORM = "model.layers.0.input_layernorm.weight"
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "ddp": ("ddp", {"dp_replicate": 4, "dp_shard": 1}),
    "fsdp1": ("fsdp1", {}),
    "hsdp": ("fsdp2", {"dp_replicate": 2, "dp_shard": 2}),
    "fsdp2 x tp": ("fsdp2", {"dp_replicate": 2, "dp_shard": 1, "tp": 2}),
    "ep": ("fsdp2", {"ep": 2}),
}


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def check_before_and_after(layout: str) -> Any:
    mode, sizes = LAYOUTS[layout]
    state = init_parallel_state(**sizes, device_type="cpu")
    model = build_mixture("qwen3_moe") if layout == "ep" else build("llama")
    model = build_parallelize_model(model, state, mode=mode)
    fine = sync_check(model, state)
    changed = next(
        p for name, p in model.named_parameters() if name.replace("_fsdp_wrapped_module.", "").endswith(NORM)
    )
    if state.rank == 3 and local(changed).numel():
        with torch.no_grad():
            local(changed)[-1] += 1e-7
    return fine, sync_check(model, state), [str(each) for each in sync_check(model, state)]


@pytest.mark.parametrize("layout", ["ddp", "hsdp", "fsdp2 x tp"])
def test_what_has_drifted_apart_is_named(layout: str, four_ranks: Ranks) -> None:
    for fine, drifted, sentences in four_ranks.run(check_before_and_after, layout):
        assert fine == []
        assert [each.name for each in drifted] == [NORM]
        other = {"ddp": (0, 1, 2), "hsdp": (1,), "fsdp2 x tp": (0, 1, 2)}[layout]
        groups = sorted(drifted[0].groups)
        assert groups == sorted([other, (3,)])
        assert "rank" in sentences[0]


@pytest.mark.parametrize("layout", ["fsdp1", "ep"])
def test_shards_are_not_taken_for_copies(layout: str, four_ranks: Ranks) -> None:
    for fine, changed, _ in four_ranks.run(check_before_and_after, layout):
        assert fine == []
        assert changed == []  # no other rank holds this shard


def drift_in_buffers_and_modules() -> list[str]:
    state = init_parallel_state(dp_replicate=2, dp_shard=1, device_type="cpu")
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    model[0](torch.randn(4, 2, generator=torch.Generator().manual_seed(state.rank)))
    if state.rank:
        model.append(nn.Linear(1, 1, bias=False))
    return [str(each) for each in sync_check(model, state)]


def test_buffers_and_lacking_parameters_are_named(two_ranks: Ranks) -> None:
    found = two_ranks.run(drift_in_buffers_and_modules)
    assert found[0] == found[1]
    assert found[0] == [
        "0.running_mean differs between rank 0 and rank 1",
        "0.running_var differs between rank 0 and rank 1",
        "2.weight differs between rank 1 and rank 0",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_any_bit_changes_the_sum(dtype: torch.dtype) -> None:
    from veomni_parallel.replica_checks import _checksum

    x = (torch.arange(7) % 2).to(dtype)
    sums = {_checksum(x), _checksum(x.flip(0)), _checksum(x.roll(1)), _checksum(x[:6]), _checksum(x[None])}
    assert len(sums) == 4 + (not torch.equal(x, x.flip(0)))
    assert _checksum(x) == _checksum(x.clone())
    assert _checksum(torch.zeros(0)) != _checksum(torch.zeros(1))
    assert _checksum(torch.tensor(0.0)) != _checksum(torch.tensor(-0.0))


def break_a_gradient(mode: str) -> list[tuple[Any, ...]]:
    state = init_parallel_state(device_type="cpu")
    model = build_parallelize_model(build("llama"), state, mode=mode)
    loss = model(**pack(samples()[state.rank :: 2]), num_items_in_batch=10).loss
    loss = loss * float("nan") if state.rank == 1 else loss
    loss.backward()
    return [tuple(each) for each in find_nonfinite(model, state, loss)]


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_gradients_that_are_not_finite_are_named_with_their_ranks(mode: str, two_ranks: Ranks) -> None:
    found = two_ranks.run(break_a_gradient, mode)
    assert found[0] == found[1]
    assert found[0][0] == ("the loss", 1, "nan", 1)
    names = {name for name, *_ in found[0][1:]}
    assert names == {name for name, _ in build("llama").named_parameters()}


def test_finite_gradients_are_not_named() -> None:
    model = nn.Linear(2, 1)
    state = init_parallel_state(device_type="cpu")
    model(torch.ones(1, 2)).sum().backward()
    assert find_nonfinite(model, state) == []
    assert model.weight.grad is not None
    model.weight.grad[0, 1] = float("inf")
    model.weight.grad[0, 0] = float("nan")
    (found,) = find_nonfinite(model, state)
    assert str(found) == "weight has 2 nan and inf on rank 0"
