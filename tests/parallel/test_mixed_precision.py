from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from veomni_parallel import MixedPrecision, build_parallelize_model, init_parallel_state

from tests.parallel.mixtures import build
from tests.parallel.parity import pack, samples

ISLANDS = MixedPrecision(float32=("*.mlp", "model.norm"), output_dtype=torch.float64)


def islands(mode: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    state, seen = init_parallel_state(device_type="cpu"), {}
    model = build("llama").to(dtype)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "lm_head"):
        module = model.get_submodule(name)
        original = module.forward

        def forward(x: torch.Tensor, name: str = name, original: Any = original) -> torch.Tensor:
            out = original(x)
            seen[name] = (x.dtype, out.dtype)
            return out

        module.forward = forward
    model = build_parallelize_model(model, state, mode=mode, mixed_precision=ISLANDS)
    out = model(**pack(samples()), num_items_in_batch=57)
    out.loss.backward()
    return {
        "seen": seen,
        "output": (out.loss.dtype, out.logits.dtype),
        "loss": out.loss.item(),
        "gradients": {p.grad.dtype for p in model.parameters() if p.grad is not None and p.grad.numel()},
    }


@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_islands_compute_in_float32_amid_bf16_and_the_output_has_its_type(mode: str, two_ranks: Ranks) -> None:
    expected = build("llama")(**pack(samples()), num_items_in_batch=57).loss.item()
    for got in two_ranks.run(islands, mode):
        assert got["seen"]["model.layers.0.mlp.up_proj"] == (torch.float32, torch.float32)
        assert got["seen"]["model.layers.0.self_attn.q_proj"][1] == torch.bfloat16
        assert got["seen"]["lm_head"][1] == torch.bfloat16
        assert got["output"] == (torch.float64, torch.float64)
        assert got["loss"] == pytest.approx(expected, rel=0.03)
        assert got["gradients"] == {torch.float32}


def test_one_process_has_islands_too() -> None:
    got = islands("fsdp2")
    assert got["seen"]["model.layers.0.mlp.up_proj"] == (torch.float32, torch.float32)
    assert got["seen"]["lm_head"][1] == torch.bfloat16


def test_islands_of_a_bf16_model_keep_float32_parameters(two_ranks: Ranks) -> None:
    for got in two_ranks.run(islands, "fsdp2", torch.bfloat16):
        assert got["seen"]["model.layers.0.mlp.up_proj"] == (torch.float32, torch.float32)
        assert got["gradients"] == {torch.float32, torch.bfloat16}


def test_an_island_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MixedPrecision.float32: '\*.router' matches no module of Linear"):
        build_parallelize_model(
            nn.Linear(2, 2),
            init_parallel_state(device_type="cpu"),
            mixed_precision=MixedPrecision(float32=["*.router"]),
        )


def reduced(dtype: torch.dtype) -> torch.Tensor:
    """Ranks with gradients 1 and 2^-9: their sum is not a number of bfloat16."""
    state = init_parallel_state(device_type="cpu")
    model = nn.Linear(1, 1, bias=False)
    precision = MixedPrecision(torch.float32, dtype)
    model = build_parallelize_model(model, state, mixed_precision=precision)
    model(torch.tensor([[1.0, 2.0**-9][state.rank]]).view(1, 1)).sum().backward()
    return model.weight.grad.full_tensor() * 2


def test_gradients_are_summed_in_the_reduce_type(two_ranks: Ranks) -> None:
    assert two_ranks.run(reduced, torch.float32)[0].item() == 1 + 2.0**-9
    assert two_ranks.run(reduced, torch.bfloat16)[0].item() == 1.0
