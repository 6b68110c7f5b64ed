"""Each optimizer has the numbers of one process on shards, and goes on from a checkpoint as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from veomni_ckpt import CheckpointError, CheckpointManager
from veomni_config import ConfigError
from veomni_parallel import build_parallelize_model, init_parallel_state, loss_scale
from veomni_recipes.adafactor import Adafactor
from veomni_recipes.ema import update_ema
from veomni_recipes.muon import newton_schulz
from veomni_recipes.optimization import build_optimizer, hidden_matrices, set_learning_rate
from veomni_recipes.shards import local

EXACT = ("adamw", "adafactor", "muon")
# states of few bits round otherwise on shards; of five steps as long as 1e-2 that may change so much
BOUNDS = {"anyprecision_adamw": 5e-4, "adamw_8bit": 5e-3}
KINDS = (*EXACT, *BOUNDS)
FLOAT32 = {"ns_dtype": "float32"}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "dp 2": (2, {"dp_shard": 2}),
    "tp 2": (2, {"tp": 2}),
    "ep 2": (2, {"ep": 2}),
    "dp 2 x tp 2": (4, {"tp": 2}),
    "dp 4, ep 2": (4, {"ep": 2}),
    "two replicas of dp 2": (4, {"dp_replicate": 2}),
}
EMA = 0.75


def tiny_moe() -> nn.Module:
    """A mixture of experts with all kinds of parameters: an embedding, a head, norms, matrices, experts, a router."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        use_cache=False,
        output_router_logits=False,
    )
    return Qwen3MoeForCausalLM(config)


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int,
    last: int,
    state: Any = None,
    ema: float | None = EMA,
) -> list[float]:
    """Steps of a number each on rows of their own, dealt to the data-parallel ranks; the losses of this rank."""
    rank, size = (0, 1) if state is None else (state.dp.get_local_rank(), state.dp.size())
    losses = []
    for step in range(first, last):
        rows = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(step))
        own = rows[rank * 4 // size : (rank + 1) * 4 // size]
        loss = model(input_ids=own, labels=own, num_items_in_batch=torch.tensor(60)).loss
        (loss * (1 if state is None else loss_scale(state))).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(optimizer, ema)
        losses.append(loss.item())
    return losses


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(kind: str, sizes: dict[str, int] | None) -> dict[str, torch.Tensor]:
    """The weights after five steps, of one process if no sizes are given."""
    model, state = tiny_moe(), None
    if sizes is not None:
        state = init_parallel_state(**sizes, device_type="cpu")
        model = build_parallelize_model(model, state, mode="fsdp2")
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1, optimizer=kind, muon=FLOAT32)
    steps(model, optimizer, 0, 5, state)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def all_trained(sizes: dict[str, int]) -> list[dict[str, torch.Tensor]]:
    return [trained(kind, sizes) for kind in KINDS]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if LAYOUTS[name][0] > 2 else []) for name in LAYOUTS]
)
def test_shards_have_the_weights_of_one_process(layout: str, two_ranks: Ranks, four_ranks: Ranks) -> None:
    world, sizes = LAYOUTS[layout]
    answers = (two_ranks if world == 2 else four_ranks).run(all_trained, sizes, timeout=300)
    for kind, *found in zip(KINDS, *answers, strict=True):
        truth = trained(kind, None)
        bound = BOUNDS.get(kind, 1e-5)
        for weights in found:
            worst = max((weights[name] - truth[name]).abs().max().item() for name in truth)
            assert worst <= bound, (kind, worst)
        assert not torch.equal(truth["lm_head.weight"], tiny_moe().state_dict()["lm_head.weight"])


def test_muon_is_torchs_own_on_matrices() -> None:
    """In bfloat16, in which torch's always computes: rounding is all that differs."""
    ours, theirs = tiny_moe(), tiny_moe()
    matrices = [p for p in theirs.parameters() if p.ndim == 2 and p.shape[0] != 64]
    others = [p for p in theirs.parameters() if not any(p is matrix for matrix in matrices) and p.ndim < 3]
    experts = [p for p in theirs.parameters() if p.ndim == 3]
    optimizer = build_optimizer(ours, lr=1e-2, weight_decay=0.1, optimizer="muon")
    torch_muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    torch_adamw = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        for model in (ours, theirs):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        torch_muon.step()
        torch_adamw.step()
    start = tiny_moe()
    for a, b, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        if any(b is expert for expert in experts):
            continue
        assert (a - b).abs().max() <= 0.02 * (b - before).abs().max()
    for (
        name,
        expert,
    ) in ours.named_parameters():  # each expert is a matrix of its own: all their singular values are alike
        if name.endswith("down_proj"):
            moved = torch.linalg.svdvals((expert - dict(start.named_parameters())[name]).detach())
            assert moved.shape == (4, 24)
            assert (moved.amax(0) / moved.amin(0)).max() < 1.5


def test_adafactor_is_torchs_own() -> None:
    shapes = ((12, 33), (33,), (5, 6, 7), (1, 4), (4, 1))
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizer = Adafactor([{"params": ours}], lr=1e-2, weight_decay=0.1)
    torchs = torch.optim.Adafactor(theirs, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * 10 ** (step - 4)
            b.grad = a.grad.clone()
        optimizer.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_newton_schulz_is_its_formula() -> None:
    a, b, c = 3.4445, -4.7750, 2.0315
    for m, n in ((5, 8), (8, 5), (6, 6)):
        matrices = torch.randn(3, m, n, generator=torch.Generator().manual_seed(m))
        for matrix, found in zip(matrices.double(), newton_schulz(matrices, 5, (a, b, c), 1e-7), strict=True):
            u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
            for _ in range(5):
                s = a * s + b * s**3 + c * s**5
            torch.testing.assert_close(found.double(), u * s @ v, atol=1e-4, rtol=0)


def test_muon_takes_matrices_of_hidden_layers_and_adamw_the_rest() -> None:
    model = tiny_moe()
    found = {
        name.split(".")[-2] + "." + name.split(".")[-1]
        for name, p in model.named_parameters()
        if id(p) in hidden_matrices(model)
    }
    attention = {f"{name}_proj.weight" for name in "qkvo"}
    assert found == attention | {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}


class Mixed(nn.Module):
    """Parameters that divide over ranks or do not, and some that are large enough for 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(64, 128), nn.LayerNorm(128)
        self.wide, self.narrow = nn.Linear(128, 128), nn.Linear(128, 33)
        self.head = nn.Linear(33, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> Any:
        hidden = torch.tanh(self.narrow(torch.tanh(self.wide(self.norm(self.embed(input_ids))))))
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
        return CausalLMOutput(loss=loss / num_items_in_batch)


def mixed(kind: str, ranks: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model: nn.Module = Mixed().to(dtype)
    state = None
    if ranks > 1:
        state = init_parallel_state(dp_shard=ranks, device_type="cpu")
        model = build_parallelize_model(model, state, mode="fsdp2")
    return model, build_optimizer(model, lr=1e-2, weight_decay=0.1, optimizer=kind, muon=FLOAT32), state


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The weights and this rank's part of the optimizer's state, as plain tensors."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = whole(p)
        for key, value in optimizer.state[p].items():
            part = local(value)
            found[f"{name} {key}"] = part.dequantize() if type(part).__name__ == "OptimState8bit" else part.clone()
    return found


def save_and_go_on(kinds: tuple[str, ...], folder: Path, ranks: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for kind in kinds:
        model, optimizer, state = mixed(kind, ranks)
        steps(model, optimizer, 0, 3, state)
        CheckpointManager(folder / kind).save(3, model, optimizer)
        steps(model, optimizer, 3, 5, state)
        found.append(everything(model, optimizer))
    return found


def load_and_go_on(kinds: tuple[str, ...], folder: Path, ranks: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for kind in kinds:
        model, optimizer, state = mixed(kind, ranks)
        assert CheckpointManager(folder / kind).load("auto", model, optimizer) is not None
        steps(model, optimizer, 3, 5, state)
        found.append(everything(model, optimizer))
    return found


def load_and_save(kinds: tuple[str, ...], folder: Path, target: Path) -> None:
    for kind in kinds:
        model, optimizer, _ = mixed(kind, 1)
        CheckpointManager(folder / kind).load("auto", model, optimizer)
        CheckpointManager(target / kind).save(3, model, optimizer)


def test_a_run_goes_on_bitwise_also_by_way_of_one_process(tmp_path: Path, two_ranks: Ranks) -> None:
    undisturbed = two_ranks.run(save_and_go_on, KINDS, tmp_path / "two", 2, timeout=300)
    load_and_save(KINDS, tmp_path / "two", tmp_path / "one")
    for folder in (tmp_path / "two", tmp_path / "one"):
        continued = two_ranks.run(load_and_go_on, KINDS, folder, 2, timeout=300)
        for rank in range(2):
            for kind, expected, found in zip(KINDS, undisturbed[rank], continued[rank], strict=True):
                assert expected.keys() == found.keys()
                assert "wide.weight ema" in found
                for name, value in expected.items():
                    assert torch.equal(value, found[name]), (folder.name, kind, name)


def test_one_process_goes_on_with_what_two_have_saved(tmp_path: Path, two_ranks: Ranks) -> None:
    undisturbed = two_ranks.run(save_and_go_on, EXACT, tmp_path, 2, timeout=300)[0]
    for kind, expected, found in zip(EXACT, undisturbed, load_and_go_on(EXACT, tmp_path, 1), strict=True):
        for name, _ in Mixed().named_parameters():
            assert (expected[name] - found[name]).abs().max() <= 1e-5, (kind, name)


def close_to_adamw(kind: str, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """How far the weights are from AdamW's after 60 steps, and how far AdamW has moved them: norms."""
    models = [mixed("adamw", 1), mixed(kind, 1, dtype)]
    for model, optimizer, _ in models:
        for step in range(60):
            for number, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                # gradients that become smaller, so that the second moment has to as well
                p.grad = (torch.randn(p.shape, generator=generator) + 0.5).mul(0.9**step).to(p.dtype)
            optimizer.step()
    ours, adamw = (torch.cat([p.detach().float().flatten() for p in model.parameters()]) for model, _, _ in models)
    start = torch.cat([p.detach().flatten() for p in Mixed().parameters()])
    return (ours - adamw).norm().item(), (adamw - start).norm().item()


@pytest.mark.parametrize("kind", ["anyprecision_adamw", "adamw_8bit"])
def test_states_of_few_bits_step_like_adamw(kind: str) -> None:
    off, moved = close_to_adamw(kind)
    assert 0 < off < 0.05 * moved


def test_weights_in_bfloat16_lose_no_update() -> None:
    off, moved = close_to_adamw("anyprecision_adamw", torch.bfloat16)
    plain, _ = close_to_adamw("adamw", torch.bfloat16)
    assert off < 0.05 * moved < plain
    model, optimizer, _ = mixed("anyprecision_adamw", 1, torch.bfloat16)
    steps(model, optimizer, 0, 1)
    states = optimizer.state[model.get_parameter("wide.weight")]
    assert {key: value.dtype for key, value in states.items() if key != "step"} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq", "compensation", "ema"), torch.bfloat16
    )


def test_an_optimizer_does_not_go_on_with_the_state_of_another(tmp_path: Path) -> None:
    model, optimizer, _ = mixed("adamw", 1)
    steps(model, optimizer, 0, 1)
    CheckpointManager(tmp_path).save(1, model, optimizer)
    model, optimizer, _ = mixed("muon", 1)
    with pytest.raises(CheckpointError, match="has the state of the optimizer AdamW, and Muon cannot go on with it"):
        CheckpointManager(tmp_path).load("auto", model, optimizer)


def test_muon_needs_a_matrix() -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer: muon finds no matrix .* set it to adamw"):
        build_optimizer(nn.LayerNorm(4), lr=1e-3, optimizer="muon")


def test_matrices_of_muon_have_a_peak_and_a_decay_of_their_own() -> None:
    model = Mixed()
    muon = {"lr": 3e-2, "weight_decay": 0.2}
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1, no_decay_params=["bias"], optimizer="muon", muon=muon)
    set_learning_rate(optimizer, 5e-3)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found[id(model.wide.weight)] == pytest.approx((1.5e-2, 0.2))
    assert found[id(model.embed.weight)] == pytest.approx((5e-3, 0.1))
    assert found[id(model.wide.bias)] == pytest.approx((5e-3, 0.0))


def test_the_learning_rate_of_compiled_steps_is_set_where_they_read_it() -> None:
    model, optimizer, _ = mixed("adamw_8bit", 1)
    set_learning_rate(optimizer, 0.0)
    before = model.get_parameter("wide.weight").clone()
    steps(model, optimizer, 0, 1)
    assert torch.equal(model.get_parameter("wide.weight"), before)
