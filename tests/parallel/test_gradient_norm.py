from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ranks import Ranks
from veomni_parallel import build_parallelize_model, clip_grad_norm_, init_parallel_state

from tests.parallel.parity import build, gradients_of, pack, samples


def test_clipping_matches_torch_on_one_process() -> None:
    models = [torch.nn.Linear(3, 4) for _ in range(2)]
    for model in models:
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + i)
    norm = clip_grad_norm_(models[0], 0.1, init_parallel_state(device_type="cpu"))
    assert norm.ndim == 0
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.1))
    torch.testing.assert_close(models[0].weight.grad, models[1].weight.grad)


def test_an_infinite_bound_only_measures() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.grad = torch.tensor([[1.0, 2.0, 2.0]])
    assert clip_grad_norm_(model, math.inf, init_parallel_state(device_type="cpu")).item() == 3.0
    assert model.weight.grad.tolist() == [[1.0, 2.0, 2.0]]


def test_no_gradient_at_all_is_a_norm_of_zero() -> None:
    assert clip_grad_norm_(torch.nn.Linear(2, 2), 1.0, init_parallel_state(device_type="cpu")).item() == 0.0


def norms(mode: str) -> dict[str, Any]:
    state = init_parallel_state(device_type="cpu")
    model = build_parallelize_model(build("llama"), state, mode=mode)
    batch = pack(samples()[state.rank :: 2])
    model(**batch, num_items_in_batch=10).loss.backward()
    whole = gradients_of(model)
    measured = [clip_grad_norm_(model, math.inf, state) for _ in range(3)]
    return {"norms": measured, "expected": torch.stack([g.double().norm() for g in whole.values()]).norm().item()}


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_the_norm_is_the_same_bits_on_every_rank_and_every_time(mode: str, two_ranks: Ranks) -> None:
    got = two_ranks.run(norms, mode)
    everything = [norm for g in got for norm in g["norms"]]
    assert all(type(norm) is torch.Tensor and norm.dtype == torch.float32 for norm in everything)
    assert all(torch.equal(norm, everything[0]) for norm in everything)
    assert everything[0].item() == pytest.approx(got[0]["expected"], rel=1e-6)
