"""Experts dealt over ranks: loss and every gradient are those of one process that runs each sample alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from veomni_parallel import (
    ExchangePlan,
    ParallelPlan,
    apply_expert_parallel,
    balance_experts_,
    build_parallelize_model,
    init_parallel_state,
    plan_exchange,
    tokens_per_expert,
)

from tests.parallel.mixtures import StrangerExperts, build, expert_counts, samples, step, truth
from tests.parallel.parity import TOLERANCE, assert_true, gradients_of, pack, worst

STRANGER = {"plan": {"experts": ["mixtures.*"]}}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "ep 2": (2, {"ep": 2}),
    "ep 4": (4, {"ep": 4}),
    "ep 2 x ep_fsdp 2": (4, {"ep": 2}),
    "ep 2 in two replicas": (4, {"ep": 2, "dp_replicate": 2}),
    "ep 2 x ulysses 2": (4, {"ep": 2, "ulysses": 2}),
    "ep 2, ulysses 2": (2, {"ep": 2, "ulysses": 2}),
    "ep 2 x tp 2": (4, {"ep": 2, "tp": 2}),
    "ep 2, tp 2": (2, {"ep": 2, "tp": 2}),
    "ep 4, tp 2": (4, {"ep": 4, "tp": 2}),
    "ep 2 x ep_fsdp 2, ep outside": (4, {"ep": 2, "ep_outside": True}),
}
MODELS = ("mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "stranger")


def run(name: str, layout: str, two_ranks: Ranks, four_ranks: Ranks, **options: Any) -> list[dict[str, Any]]:
    world, sizes = LAYOUTS[layout]
    options = (STRANGER if name == "stranger" else {}) | options
    return (two_ranks if world == 2 else four_ranks).run(step, name, sizes, options)


@pytest.mark.parametrize("name", MODELS)
def test_experts_on_two_ranks_have_the_gradients_of_one_process(name: str, two_ranks: Ranks, four_ranks: Ranks) -> None:
    assert_true(truth(name), run(name, "ep 2", two_ranks, four_ranks))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "ep 2"])
def test_experts_beside_any_other_parallelism_have_the_gradients_of_one_process(
    layout: str, two_ranks: Ranks, four_ranks: Ranks
) -> None:
    assert_true(truth("qwen3_moe"), run("qwen3_moe", layout, two_ranks, four_ranks))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "ep 2" and "tp" not in layout])
def test_a_strangers_experts_in_every_layout(layout: str, two_ranks: Ranks, four_ranks: Ranks) -> None:
    assert_true(truth("stranger"), run("stranger", layout, two_ranks, four_ranks))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_whatever_computes_the_experts_runs_on_each_ranks_own(implementation: str, two_ranks: Ranks) -> None:
    results = two_ranks.run(configured, implementation)
    _, gradients = truth("qwen3_moe")
    assert worst(results[0], gradients)[0] <= TOLERANCE


def configured(implementation: str) -> dict[str, torch.Tensor]:
    state = init_parallel_state(ep=2, device_type="cpu")
    model = build("qwen3_moe")
    model.set_experts_implementation(implementation)
    model = build_parallelize_model(model, state)
    data = samples()
    total = sum(int((sample["shift_labels"] != -100).sum()) for sample in data)
    (model(**pack(data[state.rank :: 2]), num_items_in_batch=total).loss * 2).backward()
    return gradients_of(model)


def test_recomputing_blocks_changes_nothing_and_counts_tokens_once(two_ranks: Ranks, four_ranks: Ranks) -> None:
    results = run("qwen3_moe", "ep 2", two_ranks, four_ranks, activation_checkpointing="full")
    assert_true(truth("qwen3_moe"), results)
    assert {name: count.tolist() for name, count in results[0]["counts"].items()} == expert_counts("qwen3_moe")


@pytest.mark.parametrize("layout", ["ep 2", "ep 2 x ulysses 2", "ep 2 x tp 2", "ep 2 in two replicas"])
def test_every_token_is_counted_once_however_tokens_are_dealt(layout: str, two_ranks: Ranks, four_ranks: Ranks) -> None:
    expected = expert_counts("qwen3_moe")
    for result in run("qwen3_moe", layout, two_ranks, four_ranks):
        assert result["counts"].keys() == expected.keys()
        for name, count in result["counts"].items():
            extra = count - torch.tensor(expected[name])
            # rows of 13, 46, 7 and 19 tokens are padded to even ones, and a token chooses two experts
            assert extra.min() >= 0
            assert extra.sum() == (3 * 2 if "ulysses" in layout else 0)


def one_sided() -> dict[str, Any]:
    """All tokens choose experts 0 and 1, which live on rank 0."""
    state = init_parallel_state(ep=2, device_type="cpu")
    models = []
    for sizes in ({}, {"ep": 2}):
        model = build("deepseek_v3")
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.copy_(torch.tensor([100.0, 100.0, 0.0, 0.0]))
        models.append(build_parallelize_model(model, init_parallel_state(**sizes, device_type="cpu")))
        models[-1](**pack(samples()[state.rank :: 2]), num_items_in_batch=60).loss.backward()
    counts = tokens_per_expert(models[1], state)
    local = [p.grad.to_local() for n, p in models[1].named_parameters() if ".mlp.experts." in n]
    return {"gradients": [gradients_of(model) for model in models], "counts": counts, "local": local}


def test_a_rank_whose_experts_get_no_token_takes_part_with_gradients_of_zero(two_ranks: Ranks) -> None:
    for rank, got in enumerate(two_ranks.run(one_sided)):
        (count,) = got["counts"].values()
        assert count[0] == count[1] > 0
        assert count[2:].tolist() == [0, 0]
        assert worst(got["gradients"][1], got["gradients"][0])[0] <= TOLERANCE
        assert all(bool(gradient.any()) is (rank == 0) for gradient in got["local"])


def placements() -> dict[str, Any]:
    state = init_parallel_state(ep=2, device_type="cpu")
    model = build_parallelize_model(build("gpt_oss"), state)
    experts = model.model.layers[0].mlp.experts
    return {
        "experts": {name: (tuple(p.placements), tuple(p.to_local().shape)) for name, p in experts.named_parameters()},
        "names": [name for name, _ in model.named_parameters()]
        == [name for name, _ in build("gpt_oss").named_parameters()],
        "whole": all(
            torch.equal(p.full_tensor(), q)
            for p, q in zip(model.parameters(), build("gpt_oss").parameters(), strict=True)
        ),
        "router": tuple(model.model.layers[0].mlp.router.weight.placements),
    }


def test_experts_are_sharded_over_ep_in_dim_0_and_over_ep_fsdp_in_dim_1(four_ranks: Ranks) -> None:
    for got in four_ranks.run(placements):
        assert got["experts"] == {
            "gate_up_proj": ((Shard(1), Shard(0)), (2, 16, 96)),
            "gate_up_proj_bias": ((Shard(1), Shard(0)), (2, 48)),
            "down_proj": ((Shard(1), Shard(0)), (2, 24, 32)),
            "down_proj_bias": ((Shard(1), Shard(0)), (2, 16)),
        }
        assert got["names"], "names of parameters changed"
        assert got["whole"], "weights changed"
        assert got["router"] == (Shard(0),)


def test_replicas_hold_the_same_experts(four_ranks: Ranks) -> None:
    for placement in four_ranks.run(replicated_placements):
        assert placement == (Replicate(), Shard(1), Shard(0))


def replicated_placements() -> Any:
    state = init_parallel_state(ep=2, dp_replicate=2, device_type="cpu")
    model = build_parallelize_model(build("mixtral"), state)
    return tuple(model.model.layers[0].mlp.experts.down_proj.placements)


def planned() -> dict[str, Any]:
    """A plan that is made elsewhere: here it notes what it is asked and answers as the default does."""
    asked: list[list[int]] = []

    def plan(counts: torch.Tensor, group: Any) -> ExchangePlan:
        asked.append(counts.tolist())
        return plan_exchange(counts, group)

    state = init_parallel_state(ep=2, device_type="cpu")
    model = build("mixtral")
    apply_expert_parallel(model, state, plan=plan)
    with torch.no_grad():
        model(**pack(samples()[:1]))
    return {"asked": asked, "tokens": len(samples()[0]["input_ids"])}


def test_one_function_decides_the_sizes_of_an_exchange_and_can_be_replaced(two_ranks: Ranks) -> None:
    for got in two_ranks.run(planned):
        assert [sum(counts) for counts in got["asked"]] == [2 * got["tokens"]] * 2
        assert all(len(counts) == 4 for counts in got["asked"])


def balanced() -> dict[str, Any]:
    state = init_parallel_state(ep=2, device_type="cpu")
    model = build_parallelize_model(build("deepseek_v3"), state)
    router = model.model.layers[1].mlp.gate
    before = router.e_score_correction_bias.clone()
    model(**pack(samples()[state.rank :: 2]), num_items_in_batch=60).loss.backward()
    (load,) = balance_experts_(model, state, rate=0.25).values()
    again = tokens_per_expert(model, state)
    return {"moved": router.e_score_correction_bias - before, "load": load, "again": again}


def test_selection_biases_move_against_the_load_of_all_ranks(two_ranks: Ranks) -> None:
    results = two_ranks.run(balanced)
    for got in results:
        load = got["load"].double()
        assert load.sum() == 2 * sum(len(sample["input_ids"]) for sample in samples())
        torch.testing.assert_close(got["moved"].double(), 0.25 * torch.sign(load.mean() - load))
        assert torch.equal(got["moved"], results[0]["moved"])
        assert all(not count.any() for count in got["again"].values()), "counts did not start anew"


def test_counting_and_balancing_work_without_expert_parallelism() -> None:
    state = init_parallel_state(device_type="cpu")
    model = build("deepseek_v3")
    apply_expert_parallel(model, state)
    model = build_parallelize_model(model, state)
    model(**pack(samples()), num_items_in_batch=60).loss.backward()
    assert {name: count.tolist() for name, count in tokens_per_expert(model, state, reset=False).items()} == (
        expert_counts("deepseek_v3")
    )
    assert balance_experts_(model, state).keys() == expert_counts("deepseek_v3").keys()


def sentence(name: str, sizes: dict[str, int], given: list[str] | str | None) -> str:
    state = init_parallel_state(**sizes, device_type="cpu")
    model = Odd() if name == "odd" else build(name)
    options: dict[str, Any] = {"mode": given} if isinstance(given, str) else {"plan": ParallelPlan(experts=given)}
    try:
        build_parallelize_model(model, state, **options)
        balance_experts_(model, state)
    except ValueError as error:
        return str(error)
    return "accepted"


class Odd(nn.Module):
    """Modules that do not keep the protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.linear, self.mixed = StrangerExperts(3, 8), nn.Linear(4, 2), StrangerExperts(4, 8)
        self.mixed.scale = nn.Parameter(torch.ones(8))


@pytest.mark.parametrize(
    ("name", "sizes", "given", "words"),
    [
        ("llama", {"ep": 2}, None, "has no experts module that transformers' ExpertsInterface knows: use ep=1"),
        ("odd", {"ep": 2}, ["four"], "experts: 'four' matches no module of Odd"),
        ("odd", {"ep": 2}, ["three"], "3 experts of three cannot be dealt evenly over ep=2 ranks"),
        ("odd", {"ep": 2}, ["linear"], "forward must take (hidden, index, weights), but it is forward(input"),
        ("odd", {"ep": 2}, ["mixed"], "must all have the experts in dimension 0, but those are of sizes [4, 8]"),
        ("odd", {}, ["four"], "experts: 'four' matches no module of Odd"),
        ("mixtral", {"ep": 2}, "ddp", 'tp=1 and ep=2 need mode="fsdp2", not "ddp"'),
        ("mixtral", {"ep": 2}, None, "has no selection bias (e_score_correction_bias or expert_bias)"),
    ],
)
def test_experts_that_cannot_be_dealt_are_refused(
    name: str, sizes: dict[str, int], given: Any, words: str, two_ranks: Ranks
) -> None:
    for message in two_ranks.run(sentence, name, sizes, given):
        assert words in message


def twice() -> str:
    state = init_parallel_state(ep=2, device_type="cpu")
    model = build("mixtral")
    apply_expert_parallel(model, state)
    try:
        apply_expert_parallel(model, state)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_experts_are_dealt_once(two_ranks: Ranks) -> None:
    assert all("are dealt over ranks already" in message for message in two_ranks.run(twice))


def half() -> dict[str, Any]:
    state = init_parallel_state(ep=2, device_type="cpu")
    model = build_parallelize_model(build("qwen3_moe"), state, mixed_precision="bf16")
    loss = model(**pack(samples()[state.rank :: 2]), num_items_in_batch=60).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return {"loss": total.item(), "finite": all(bool(p.grad.to_local().isfinite().all()) for p in model.parameters())}


def test_experts_compute_in_bf16(two_ranks: Ranks) -> None:
    data = samples()
    expected = build("qwen3_moe")(**pack(data), num_items_in_batch=60).loss.item()
    for got in two_ranks.run(half):
        assert got["loss"] == pytest.approx(expected, rel=0.05)
        assert got["finite"]
