from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from veomni_parallel import activation_offload, build_parallelize_model, init_parallel_state

from tests.parallel.mixtures import build
from tests.parallel.parity import gradients_of, pack, samples, worst


def gradients(model: nn.Module, **options: Any) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients, bytes that were moved, and bytes that were kept at the end of forward."""
    model.zero_grad()
    with activation_offload(min_bytes=0, **options) as report:
        loss = model(**pack(samples()), num_items_in_batch=10).loss
        kept = report.kept
        loss.backward()
    del loss
    gc.collect()
    assert report.kept == 0, "what was kept for a forward is still counted after its backward"
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, report.moved, kept


def test_activations_come_back_as_they_went() -> None:
    model = build("qwen3")
    plain, moved, _ = gradients(model)
    assert moved == 0, "what lies in host memory stays there"
    for ahead in (0, 1, 3):
        offloaded, moved, _ = gradients(model, from_cpu=True, ahead=ahead)
        assert moved > 100_000
        assert all(torch.equal(offloaded[name], plain[name]) for name in plain)


def test_a_limit_keeps_that_much_on_the_device() -> None:
    model = build("qwen3")
    _, everything, _ = gradients(model, from_cpu=True)
    half = everything / 2 / 1e9
    _, moved, kept = gradients(model, from_cpu=True, limit_gb=half)
    assert half * 1e9 * 0.9 < kept <= half * 1e9
    assert moved == everything - kept
    assert gradients(model, from_cpu=True, limit_gb=1.0)[1:] == (0, everything)


def test_weights_and_small_tensors_stay() -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 8, bias=False))
    model[1].requires_grad_(False)
    with activation_offload(min_bytes=4096, from_cpu=True) as report:
        model(torch.randn(4, 512)).square().sum().backward()
    assert report.moved == 4 * 512 * 4, "only the input of the first layer is an activation of that size"


def test_recomputed_blocks_move_their_inputs_only() -> None:
    state = init_parallel_state(device_type="cpu")
    plain = gradients(build("llama"), from_cpu=True)
    model = build_parallelize_model(build("llama"), state, activation_checkpointing="full")
    recomputed = gradients(model, from_cpu=True)
    assert recomputed[1] < plain[1]
    assert worst(recomputed[0], plain[0])[0] < 1e-6


def sharded(sizes: dict[str, int]) -> dict[str, Any]:
    state = init_parallel_state(**sizes, device_type="cpu")
    got = []
    for offload in (False, True):
        model = build_parallelize_model(build("qwen3_moe"), state)
        with activation_offload(min_bytes=0, from_cpu=offload) as report:
            model(**pack(samples()[-1:]), num_items_in_batch=10).loss.backward()
        got.append(gradients_of(model))
    return {"worst": worst(got[1], got[0]), "moved": report.moved}


@pytest.mark.parametrize("sizes", [{}, {"ep": 2}, {"tp": 2}], ids=str)
def test_gathered_and_divided_weights_are_not_moved(sizes: dict[str, int], two_ranks: Ranks) -> None:
    weights = sum(p.nbytes for p in build("qwen3_moe").parameters())
    for got in two_ranks.run(sharded, sizes):
        assert got["worst"][0] < 1e-6
        assert 0 < got["moved"] < weights / 4, "activations of a row of three tokens are few"


@pytest.mark.gpu
def test_copies_overlap_and_memory_falls_on_an_accelerator() -> None:
    device = torch.accelerator.current_accelerator()
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(16)]).to(device)
    x = torch.randn(16384, 1024, device=device, requires_grad=True)
    peaks, grads = [], []
    for limit in (None, 0.0):
        layers.zero_grad()
        x.grad = None
        torch.accelerator.reset_peak_memory_stats()
        if limit is None:
            layers(x).square().sum().backward()
        else:
            with activation_offload(limit) as report:
                layers(x).square().sum().backward()
            assert report.moved > 1e9
        torch.accelerator.synchronize()
        peaks.append(torch.accelerator.max_memory_allocated())
        grads.append([p.grad.clone() for p in layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert peaks[1] < 0.6 * peaks[0]
