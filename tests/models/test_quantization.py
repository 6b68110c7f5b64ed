"""Frozen weights in few bits, and adapters that learn on them."""

from __future__ import annotations

import peft
import pytest
import torch
from ranks import Ranks
from torch import nn
from veomni_models import ModelError, quantize_frozen
from veomni_parallel import build_parallelize_model, init_parallel_state

from tests.parallel.families import build_family
from tests.parallel.parity import gradients_of

IDS = torch.arange(2, 42)[None] % 60


def frozen_bytes(model: nn.Module) -> int:
    """Bytes that the frozen parameters take, quantised or not."""
    return sum(_bytes(parameter) for parameter in model.parameters() if not parameter.requires_grad)


def _bytes(tensor: torch.Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return sum(_bytes(part) for part in parts if part is not None)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.05), (4, 0.6)])
def test_answers_stay_near_and_weights_are_small(bits: int, error: float) -> None:
    model = build_family("llama").requires_grad_(False)
    expected, before = model(input_ids=IDS).logits, model.model.layers[0].mlp.up_proj.weight
    names = quantize_frozen(model, bits)
    assert len(names) == 14, "seven layers in each of two blocks, not the head"
    assert (model(input_ids=IDS).logits - expected).abs().max() < error * expected.abs().max()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert type(weight) is not type(before)
    rounded = weight.dequantize() if bits == 8 else weight.get_original_weight()
    assert (rounded - before).abs().max() <= before.abs().max() / (2 ** (bits - 1) - 1)
    assert len(rounded.unique()) > 2


@pytest.mark.parametrize(("bits", "bytes_a_weight"), [(8, 1.04), (4, 0.54)])
def test_frozen_layers_take_few_bytes(bits: int, bytes_a_weight: float) -> None:
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)).requires_grad_(False)
    assert frozen_bytes(model) == 2 * 256 * 512 * 4
    quantize_frozen(model, bits)
    assert frozen_bytes(model) <= 2 * 256 * 512 * bytes_a_weight


def adapted(bits: int) -> nn.Module:
    model = build_family("llama").requires_grad_(False)
    quantize_frozen(model, bits)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_learn_on_them(bits: int) -> None:
    model = adapted(bits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def step(bits: int) -> dict[str, torch.Tensor]:
    model = build_parallelize_model(adapted(bits), init_parallel_state(device_type="cpu"), mode="ddp")
    model(input_ids=IDS, labels=IDS).loss.backward()
    return gradients_of(model)


@pytest.mark.parametrize("bits", [8, 4])
def test_ddp_keeps_their_gradients(bits: int, two_ranks: Ranks) -> None:
    model = adapted(bits)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for gradients in two_ranks.run(step, bits):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad)


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ModelError, match="no frozen linear layer to quantise: freeze the model before"):
        quantize_frozen(build_family("llama"))
    with pytest.raises(ModelError, match="bits=3 is neither 8 nor 4"):
        quantize_frozen(nn.Linear(2, 2).requires_grad_(False), 3)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    with pytest.raises(ModelError, match="0 is on the meta device: load its weights before"):
        quantize_frozen(model)
