"""Matrices divided over ranks: loss and every gradient are those of one process that runs each sample alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import nn
from torch.distributed.tensor import DTensor
from veomni_parallel import (
    ParallelPlan,
    build_parallelize_model,
    clip_grad_norm_,
    init_parallel_state,
    loss_scale,
    vocabulary_parallel_cross_entropy,
)
from veomni_parallel.tensor_parallel import _STYLES as STYLES

from tests.parallel.mixtures import build, samples, step, truth
from tests.parallel.parity import TOLERANCE, assert_true, gradients_of, pack, worst

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "tp 2": (2, {"tp": 2}),
    "tp 2 x dp 2": (4, {"tp": 2}),
    "tp 2 in two replicas": (4, {"tp": 2, "dp_replicate": 2}),
    "tp 2 x ulysses 2": (4, {"tp": 2, "ulysses": 2}),
}
DENSE = ("llama", "qwen2, biases, tied", "qwen3", "phi3", "gemma3", "deepseek_v2", "apertus", "lfm2")


def run(name: str, layout: str, two_ranks: Ranks, four_ranks: Ranks, **options: Any) -> list[dict[str, Any]]:
    world, sizes = LAYOUTS[layout]
    return (two_ranks if world == 2 else four_ranks).run(step, name, sizes, options)


@pytest.mark.parametrize("name", [*DENSE, "qwen3_moe"])
def test_the_models_own_plan_has_the_gradients_of_one_process(name: str, two_ranks: Ranks, four_ranks: Ranks) -> None:
    assert_true(truth(name), run(name, "tp 2", two_ranks, four_ranks))


@pytest.mark.parametrize("name", ["qwen2, biases, tied", "qwen3_moe"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "tp 2"])
def test_divided_matrices_are_sharded_too(name: str, layout: str, two_ranks: Ranks, four_ranks: Ranks) -> None:
    assert_true(truth(name), run(name, layout, two_ranks, four_ranks))


def test_recomputed_blocks_keep_their_collectives_in_step(two_ranks: Ranks, four_ranks: Ranks) -> None:
    results = run("qwen3", "tp 2", two_ranks, four_ranks, activation_checkpointing="full")
    assert_true(truth("qwen3"), results)


class Gated(nn.Module):
    """A fused gate and up projection, whose halves are divided alike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(torch.tanh(gate) * up)


class PackedInput(nn.Module):
    """Two packed halves that one matrix joins."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(torch.cat([torch.sin(self.left(x)), torch.cos(self.right(x))], dim=-1))


class Sinks(nn.Module):
    """A module that uses a divided vector of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.sinks, self.down = (
            nn.Linear(width, width),
            nn.Parameter(torch.randn(width)),
            nn.Linear(width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x) * self.sinks)


class Stranger(nn.Module):
    """Each style that no plan above has, in a model that never heard of plans."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.columns = nn.Embedding(16, width, padding_idx=1), nn.Embedding(16, width)
        self.gated, self.packed, self.sinks = Gated(width), PackedInput(width), Sinks(width)
        self.wide, self.partial, self.norm = (
            nn.Linear(width, width),
            nn.Linear(width, width, bias=False),
            nn.LayerNorm(width),
        )
        self.head = nn.Linear(width, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids) + self.columns(ids)
        x = x + self.gated(x)
        x = x + self.packed(x)
        x = x + self.sinks(x)
        x = self.norm(x + self.wide(x))
        return self.head(x)


STRANGERS_PLAN = {
    "embedding": "embedding_rowwise",
    "columns": "embedding_colwise",
    "*.both": "packed_colwise",
    "gated.down": "rowwise",
    "packed.left": "colwise",
    "packed.right": "colwise",
    "packed.join": "packed_rowwise",
    "sinks": "local_params",
    "sinks.sinks": "colwise",
    "sinks.up": "colwise",
    "sinks.down": "rowwise",
    "wide": "rowwise_rep",
    "partial": "replicate",
    "norm": "replicate",
    "head": "colwise_rep",
}


def stranger(sizes: dict[str, int]) -> dict[str, Any]:
    state = init_parallel_state(**sizes, device_type="cpu")
    model = build_parallelize_model(Stranger(), state, plan=ParallelPlan(tp=STRANGERS_PLAN))
    ids = torch.arange(16).view(4, 4)[state.dp.get_local_rank() :: state.dp.size()]
    (F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum") * loss_scale(state)).backward()
    gradients = gradients_of(model)
    norm = clip_grad_norm_(model, 1e9, state)
    whole = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    divided = [
        name
        for name, p in model.named_parameters()
        if any(s < g for s, g in zip(p.to_local().shape, p.shape, strict=True))
    ]
    return {"gradients": gradients, "norm": norm.item(), "whole": whole, "divided": divided}


@pytest.mark.parametrize("layout", ["tp 2", "tp 2 x dp 2"])
def test_a_given_plan_divides_a_model_that_never_heard_of_plans(
    layout: str, two_ranks: Ranks, four_ranks: Ranks
) -> None:
    model, ids = Stranger(), torch.arange(16)
    F.cross_entropy(model(ids), ids, reduction="sum").backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not expected["embedding.weight"][1].any(), "the padding index has no gradient"
    world, sizes = LAYOUTS[layout]
    for got in (two_ranks if world == 2 else four_ranks).run(stranger, sizes):
        assert worst(got["gradients"], expected)[0] <= TOLERANCE
        assert got["norm"] == pytest.approx(torch.stack([g.norm() for g in expected.values()]).norm().item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            assert torch.equal(got["whole"][name], parameter), f"{name} changed"
    if layout == "tp 2":
        assert "packed.join.weight" in got["divided"]
        assert "sinks.up.weight" in got["divided"]
        assert "partial.weight" not in got["divided"]


class Latent(nn.Module):
    """Multi-head latent attention in small: a latent that heads unfold, and a part that all heads share as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (), {"qk_rope_head_dim": 2})()
        self.down, self.up = nn.Linear(8, 6 + 2), nn.Linear(6, 4 * 4)
        self.norm, self.out, self.identity = nn.LayerNorm(4), nn.Linear(4 * 6, 8), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latent, rope = self.down(x).split([6, 2], dim=-1)
        heads = self.norm(self.up(latent).unflatten(-1, (-1, 4)))  # [..., heads of this rank, 4]
        heads = torch.cat([heads, rope[..., None, :].expand(*heads.shape[:-1], 2)], dim=-1)
        return self.out((heads * heads).flatten(-2))


def latent() -> dict[str, torch.Tensor]:
    state = init_parallel_state(tp=2, device_type="cpu")
    plan = {"down": "mla_kv_a_proj", "up": "colwise", "norm": "replicated_with_grad_allreduce", "out": "rowwise"}
    model = build_parallelize_model(Latent(), state, plan=ParallelPlan(tp=plan))
    model(torch.randn(3, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    return gradients_of(model)


def test_what_heads_share_gets_the_gradients_of_all_heads(two_ranks: Ranks) -> None:
    model = Latent()
    model(torch.randn(3, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    for got in two_ranks.run(latent):
        assert worst(got, {name: p.grad for name, p in model.named_parameters()})[0] <= TOLERANCE


class Sum(nn.Module):
    """Half of the work on each rank, and an expert without weights beside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.identity = nn.Sequential(nn.Linear(4, 4)), nn.Identity()
        self.both = nn.ModuleDict({"part": self.part, "identity": self.identity})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) + self.identity(x)


def summed() -> tuple[torch.Tensor, torch.Tensor]:
    state = init_parallel_state(tp=2, device_type="cpu")
    model = nn.Sequential(Sum())
    plan = {"0": "all_reduce", "0.identity": "moe_identity_expert"}
    x = torch.ones(2, 4)
    alone = Sum()(x)
    with torch.no_grad():
        model[0].part[0].weight.div_(2)
        model[0].part[0].bias.div_(2)
    model = build_parallelize_model(model, state, plan=ParallelPlan(tp=plan, shard_units=[]))
    return model(x).detach(), alone.detach()


def test_parts_of_a_sum_are_added_and_an_identity_once(two_ranks: Ranks) -> None:
    for got, alone in two_ranks.run(summed):
        torch.testing.assert_close(got, alone)


def cross_entropy() -> dict[str, torch.Tensor]:
    state = init_parallel_state(tp=2, device_type="cpu")
    whole = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * 30
    targets = torch.tensor([0, 11, -100, 5, 6])
    logits = whole.chunk(2, -1)[state.rank].clone().requires_grad_()
    losses = vocabulary_parallel_cross_entropy(logits, targets, state.tp.get_group())
    (losses * torch.arange(5)).sum().backward()
    expected = whole.clone().requires_grad_()
    truth = F.cross_entropy(expected, targets, reduction="none")
    (truth * torch.arange(5)).sum().backward()
    return {
        "losses": losses.detach(),
        "truth": truth.detach(),
        "grad": logits.grad,
        "expected": expected.grad.chunk(2, -1)[state.rank],
    }


def test_a_divided_vocabulary_has_the_loss_and_gradients_of_the_whole_one(two_ranks: Ranks) -> None:
    for got in two_ranks.run(cross_entropy):
        torch.testing.assert_close(got["losses"], got["truth"])
        torch.testing.assert_close(got["grad"], got["expected"])


@pytest.mark.parametrize("name", ["llama", "qwen2, biases, tied"])
def test_logits_can_stay_divided(name: str, two_ranks: Ranks) -> None:
    plan = {**build(name).tp_plan, "lm_head": "vocabulary_parallel"}
    assert_true(truth(name), two_ranks.run(step, name, {"tp": 2}, {"plan": {"tp": plan}}))


def logits() -> tuple[int, ...]:
    state = init_parallel_state(tp=2, device_type="cpu")
    model = build("llama")
    plan = ParallelPlan(tp={**model.tp_plan, "lm_head": "vocabulary_parallel"})
    model = build_parallelize_model(model, state, plan=plan)
    return tuple(model(**pack(samples()[:1])).logits.shape)


def test_no_rank_holds_the_whole_logits_then(two_ranks: Ranks) -> None:
    assert two_ranks.run(logits) == [(1, 13, 32)] * 2


def memory() -> dict[str, Any]:
    state = init_parallel_state(tp=2, device_type="cpu")
    model = build_parallelize_model(build("qwen2, biases, tied"), state)
    layer = model.model.layers[0]
    return {
        "local": {name: tuple(p.to_local().shape) for name, p in layer.named_parameters()},
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "names": sorted(dict(model.named_parameters()))
        == sorted(dict(build("qwen2, biases, tied").named_parameters())),
        "distributed": all(isinstance(p, DTensor) for p in model.parameters()),
    }


def test_a_rank_holds_its_part_and_tied_weights_stay_tied(two_ranks: Ranks) -> None:
    for got in two_ranks.run(memory):
        assert got["local"]["self_attn.q_proj.weight"] == (16, 32)
        assert got["local"]["self_attn.k_proj.bias"] == (16,), "a vector stays whole"
        assert got["local"]["self_attn.o_proj.weight"] == (32, 16)
        assert got["tied"]
        assert got["names"]
        assert got["distributed"]


def alive() -> list[bool]:
    import gc
    import weakref

    state = init_parallel_state(tp=2, device_type="cpu")
    model = build_parallelize_model(build("llama"), state)
    inputs: list[Any] = []
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda module, args, output: inputs.append(weakref.ref(output)))
    gc.disable()
    try:
        model(**pack(samples()[:1]), num_items_in_batch=10).loss.backward()
        return [reference() is not None for reference in inputs]
    finally:
        gc.enable()


def test_what_projections_share_is_freed_with_the_graph(two_ranks: Ranks) -> None:
    assert two_ranks.run(alive) == [[False]] * 2


def from_meta() -> dict[str, Any]:
    import transformers
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state, whole = init_parallel_state(tp=2, device_type="cpu"), build("qwen3_moe")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(whole.config)
    model = build_parallelize_model(model, state)
    model.to_empty(device="cpu")
    set_model_state_dict(model, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
    for name, buffer in whole.named_buffers():
        model.get_buffer(name).copy_(buffer)
    batch = pack(samples())
    losses = [m(**batch, num_items_in_batch=10).loss for m in (model, whole)]
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    return {"losses": [loss.item() for loss in losses], "worst": worst(gradients_of(model), gradients)}


def test_a_meta_model_is_divided_then_filled(two_ranks: Ranks) -> None:
    for got in two_ranks.run(from_meta):
        assert got["losses"][0] == pytest.approx(got["losses"][1], rel=1e-6)
        assert got["worst"][0] <= TOLERANCE, got["worst"][1]


def test_every_style_of_transformers_is_known() -> None:
    from transformers.distributed import expert_parallel, tensor_parallel
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    assert expert_parallel is not tensor_parallel  # both register styles when imported
    assert set(ALL_PARALLEL_STYLES) <= set(STYLES)


def sentence(name: str, sizes: dict[str, int], plan: dict[str, str] | None, changes: dict[str, Any]) -> str:
    state = init_parallel_state(**sizes, device_type="cpu")
    model = Stranger() if name == "stranger" else build(name, **changes)
    try:
        build_parallelize_model(model, state, plan=ParallelPlan(tp=plan))
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("name", "plan", "changes", "words"),
    [
        ("stranger", None, {}, "Stranger has no tensor parallel plan of its own: use tp=1, or give one"),
        ("stranger", {"wide": "columns"}, {}, "'columns' of 'wide' is none of the styles all_reduce, colwise"),
        ("stranger", {"deep": "colwise"}, {}, "'deep' matches no module or parameter of Stranger"),
        ("stranger", {"norm": "colwise_rep"}, {}, "the style of norm needs a module with a weight [out, in]"),
        (
            "stranger",
            {"wide": "ep_dispatch_experts"},
            {},
            "the style of wide deals experts over ranks; that is what ep",
        ),
        ("stranger", {"head.weight": "all_reduce"}, {}, "'all_reduce' is for modules, but head.weight is a parameter"),
        (
            "llama",
            None,
            {"num_key_value_heads": 1},
            "1 heads (num_key_value_heads of LlamaAttention) cannot be divided",
        ),
        (
            "llama",
            None,
            {"vocab_size": 65},
            "Dimension 0 of lm_head.weight [65, 32] cannot be divided over tp=2 ranks: pad it",
        ),
        ("llama", None, {"intermediate_size": 47}, "mlp.gate_proj.weight [47, 32] cannot be divided over tp=2 ranks"),
        (
            "qwen2, biases, tied",
            {"model.embed_tokens": "embedding_colwise", "lm_head": "colwise_rep"},
            {},
            "lm_head.weight is shared with another module that divides it differently",
        ),
        ("llama", {"model.layers.*.mlp.down_proj": "mla_kv_a_proj"}, {}, "no config has qk_rope_head_dim"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    name: str, plan: dict[str, str] | None, changes: dict[str, Any], words: str, two_ranks: Ranks
) -> None:
    for message in two_ranks.run(sentence, name, {"tp": 2}, plan, changes):
        assert words in message


def test_heads_are_divided_over_both_tp_and_ulysses(four_ranks: Ranks) -> None:
    for message in four_ranks.run(sentence, "llama", {"tp": 2, "ulysses": 2}, None, {"num_attention_heads": 2}):
        assert "2 attention heads (num_attention_heads of LlamaForCausalLM) cannot be divided over tp=2 x" in message


def test_one_process_alone_is_the_truth_of_the_models_of_these_tests() -> None:
    loss, gradients = truth("qwen3")
    assert loss > 0
    assert "model.layers.0.self_attn.q_norm.weight" in gradients
