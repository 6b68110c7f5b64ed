"""Adapters of peft on models over ranks: loss and every gradient are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from veomni_models import (
    add_adapters,
    build_foundation_model,
    initialize_adapters,
    initialize_weights,
    merge_adapters,
    save_adapters,
    without_adapters,
)
from veomni_parallel import (
    ParallelError,
    ParallelPlan,
    build_parallelize_model,
    clip_grad_norm_,
    global_sum,
    init_parallel_state,
    loss_scale,
)

from tests.parallel.families import build_family, slice_row
from tests.parallel.parity import TOLERANCE, Gradients, gradients_of, pack, samples, worst

MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYOUTS: dict[str, tuple[int, dict[str, int], str]] = {
    "ddp 2": (2, {}, "ddp"),
    "fsdp1 2": (2, {}, "fsdp1"),
    "fsdp2 2": (2, {}, "fsdp2"),
    "hsdp 2 x 2": (4, {"dp_replicate": 2}, "fsdp2"),
    "ulysses 2": (2, {"ulysses": 2}, "fsdp2"),
    "ep 2": (2, {"ep": 2}, "fsdp2"),
    "ep 2 x ep_fsdp 2": (4, {"ep": 2}, "fsdp2"),
    "ep 2 x ulysses 2": (4, {"ep": 2, "ulysses": 2}, "fsdp2"),
}


def adapted(name: str, parameters: bool) -> nn.Module:
    """A model whose adapters do something already, on frozen weights."""
    model = build_family(name)
    experts = [key.replace("mlp", "feed_forward") if name == "llama4" else key for key in EXPERTS]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=experts if parameters else None
    )
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def total() -> int:
    return sum(int((sample["shift_labels"] != -100).sum()) for sample in samples())


def loss_of(model: nn.Module, row: dict[str, Any]) -> torch.Tensor:
    inputs = {key: value for key, value in row.items() if key not in ("labels", "shift_labels")}
    logits = model(**inputs).logits[0]
    return cross_entropy(logits, row["shift_labels"][0], reduction="sum") / total()


def truth(name: str, parameters: bool) -> tuple[float, Gradients]:
    model, loss = adapted(name, parameters), 0.0
    for sample in samples():
        logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0]
        one = cross_entropy(logits, sample["shift_labels"], reduction="sum") / total()
        one.backward()
        loss += one.item()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(name: str, parameters: bool, sizes: dict[str, int], mode: str) -> tuple[float, Gradients, float]:
    state = init_parallel_state(**sizes, device_type="cpu")
    model = build_parallelize_model(adapted(name, parameters), state, mode=mode, activation_checkpointing="full")
    row = pack(samples()[state.dp.get_local_rank() :: state.dp.size()])
    row = slice_row(row, state.sp.get_local_rank(), state.sp.size())
    loss = loss_of(model, row)
    (loss * loss_scale(state)).backward()
    gradients = gradients_of(model)
    norm = clip_grad_norm_(model, 1e9, state)
    return global_sum(loss.detach(), state.loss).item(), gradients, norm.item()


@pytest.mark.parametrize(
    ("parameters", "layout"),
    # FSDP1 flattens what the adapters of parameters change in place
    [(p, layout) for p in (False, True) for layout in LAYOUTS if not (p and "fsdp1" in layout)],
)
def test_adapters_have_the_gradients_of_one_process(
    parameters: bool, layout: str, two_ranks: Ranks, four_ranks: Ranks
) -> None:
    world, sizes, mode = LAYOUTS[layout]
    ranks = two_ranks if world == 2 else four_ranks
    loss, gradients, norm = ranks.run(step, "qwen3_moe", parameters, sizes, mode)[0]
    expected, reference = truth("qwen3_moe", parameters)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    assert mode == "fsdp1" or gradients.keys() == reference.keys(), "only adapters learn"
    difference, where = worst(gradients, reference)
    assert difference <= TOLERANCE, f"{where} is off by {difference:.1e}"
    assert norm == pytest.approx(torch.stack([g.norm() for g in reference.values()]).norm().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4"])
def test_adapters_of_experts_in_other_layouts_are_dealt_over_ranks(name: str, two_ranks: Ranks) -> None:
    loss, gradients, _ = two_ranks.run(step, name, True, {"ep": 2}, "fsdp2")[0]
    expected, reference = truth(name, True)
    assert any("experts" in key for key in reference)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    difference, where = worst(gradients, reference)
    assert difference <= TOLERANCE, f"{where} is off by {difference:.1e}"


def answers(ep: int, plan: ParallelPlan | None = None) -> list[torch.Tensor]:
    """With adapters, without them as a reference model is asked, and with them switched off."""
    state = init_parallel_state(ep=ep, device_type="cpu")
    model = build_parallelize_model(adapted("qwen3_moe", True), state, plan=plan)
    row = {"input_ids": pack(samples()[:1])["input_ids"], "use_cache": False}
    with torch.no_grad():
        logits = [model(**row).logits]
        with without_adapters(model.base_model):
            logits.append(model(**row).logits)
        with model.disable_adapter():
            logits.append(model(**row).logits)
    return logits


@pytest.mark.parametrize("plan", [None, ParallelPlan(experts=["*.mlp.experts"])], ids=["found", "named"])
def test_dealt_experts_answer_without_adapters_where_these_are_left_out(
    plan: ParallelPlan | None, two_ranks: Ranks
) -> None:
    expected = answers(1)
    assert not torch.allclose(expected[0], expected[1], rtol=0.1)
    for logits in two_ranks.run(answers, 2, plan):
        for found, wanted in zip(logits, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def refused(parameters: list[str], sizes: dict[str, int]) -> str:
    model = peft.get_peft_model(build_family("gpt_oss"), peft.LoraConfig(r=2, target_parameters=parameters))
    try:
        build_parallelize_model(model, init_parallel_state(**sizes, device_type="cpu"))
    except ParallelError as error:
        return str(error)
    return "accepted"


def test_adapters_of_experts_that_cannot_be_dealt_over_ranks_are_refused(two_ranks: Ranks) -> None:
    for message in two_ranks.run(refused, ["mlp.experts.down_proj_bias"], {"ep": 2}):
        assert "adapter of down_proj_bias of base_model.model.model.layers.0.mlp.experts" in message
        assert "has 2 dimensions: adapt weights of 3 dimensions, or use ep=1" in message
    for message in two_ranks.run(refused, EXPERTS, {"ep": 2, "tp": 2}):
        assert "ep=2 ranks together with tp=2: use tp=1, or adapt other layers only" in message


def test_adapters_with_experts_are_saved_and_merged(tmp_path: Path) -> None:
    model = adapted("qwen3_moe", True).eval()
    row = pack(samples()[:1])
    with torch.no_grad():
        expected = model(input_ids=row["input_ids"]).logits
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(build_family("qwen3_moe"), tmp_path).eval()
        assert torch.equal(loaded(input_ids=row["input_ids"]).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=row["input_ids"]).logits, expected, rtol=1e-4, atol=1e-4)


def made_on_meta(folder: Path, mode: str | None, ep: int = 1) -> dict[str, torch.Tensor]:
    """The weights of an adapted model that was made on meta and sharded, once merged; its adapters are in `folder`."""
    model = build_foundation_model(overrides=MOE)
    add_adapters(model, {"r": 2, "target_modules": ["q_proj", "down_proj"], "target_parameters": EXPERTS})
    if mode is not None:
        model = build_parallelize_model(model, init_parallel_state(ep=ep, device_type="cpu"), mode=mode)
    with without_adapters(model):
        initialize_weights(model, 0, "cpu")
    initialize_adapters(model, 1, "cpu")
    with torch.no_grad():  # B begins at zero; now the product does something
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.add_(0.1)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    save_adapters(model, folder, write=mode is None or dist.get_rank() == 0)
    merge_adapters(model)
    with without_adapters(model):
        return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}


@pytest.mark.parametrize("ep", [1, 2])
def test_adapters_made_on_meta_and_merged_on_shards_are_those_of_one_process(
    ep: int, two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path
) -> None:
    alone = made_on_meta(tmp_path / "1", None)
    for shards in (two_ranks if ep == 1 else four_ranks).run(made_on_meta, tmp_path / "2", "fsdp2", ep):
        assert shards.keys() == alone.keys()
        assert all(torch.equal(shards[name], alone[name]) for name in alone)
    files = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("1", "2")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
