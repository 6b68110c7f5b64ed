"""Bytes of every collective are those of the formulas in docs/parallel/communication.md."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from veomni_parallel import ParallelPlan, build_parallelize_model, clip_grad_norm_, global_sum, init_parallel_state

from tests.parallel.mixtures import MODELS, build
from tests.parallel.parity import TINY, VOCABULARY, cut, pack

LENGTHS = (13, 7, 12, 8)
ROW, LAYERS, WIDTH, HEADS, HEAD = sum(LENGTHS), 2, TINY["hidden_size"], TINY["num_attention_heads"], TINY["head_dim"]
B = 4  # bytes of a float32

# by name of the operator: what it is called here, and which of its tensors is handed in
KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allgather_": ("all-gather", -1),
    "_allgather_base_": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "alltoall_": ("all-to-all", -1),
}


class CountBytes(TorchDispatchMode):
    """Bytes that this rank hands to each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and not func._opname.startswith(("barrier", "monitored")):
            kind, which = KINDS[func._opname]
            self.bytes[kind] += _tensors(args)[which].nbytes
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def counted(name: str, sizes: dict[str, int], options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Bytes of forward and backward, and of the norm, on this rank; every data-parallel rank has a row of 40 tokens."""
    state = init_parallel_state(**sizes, device_type="cpu")
    if isinstance(plan := options.get("plan"), dict):
        options = options | {"plan": ParallelPlan(**plan)}
    model = build_parallelize_model(build(name, **changes), state, **options)
    generator = torch.Generator().manual_seed(state.dp.get_local_rank())
    ids = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    row = cut(pack([{"input_ids": i, "shift_labels": i} for i in ids]), state.sp.get_local_rank(), state.sp.size())
    with CountBytes() as step:
        model(**row, num_items_in_batch=10).loss.backward()
    with CountBytes() as norm:
        clip_grad_norm_(model, 1.0, state)
    with CountBytes() as number:
        global_sum(1.0, state.loss)
    return {"step": step.bytes, "norm": norm.bytes, "number": number.bytes}


def run(
    ranks: Ranks,
    name: str,
    sizes: dict[str, int],
    options: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Counter[str]]:
    """Bytes over all ranks."""
    total: dict[str, Counter[str]] = {"step": Counter(), "norm": Counter(), "number": Counter()}
    for counts in ranks.run(counted, name, sizes, options or {}, changes or {}):
        for part, found in counts.items():
            total[part] += found
    return total


def units(model: nn.Module, ranks: int, without: str = "nothing") -> tuple[int, int]:
    """sum of pad(u) over blocks, and pad(root), in elements."""
    padded = {
        name: math.ceil(len(p) / ranks) * ranks * p[0].numel()
        for name, p in model.named_parameters()
        if without not in name
    }
    blocks = sum(size for name, size in padded.items() if ".layers." in name)
    return blocks, sum(padded.values()) - blocks


def experts(model: nn.Module, ep: int) -> int:
    """Elements of the experts that one rank gathers; they are sharded in dimension 1, which `ep_fsdp` divides."""
    return sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) // ep


def fully_sharded(model: nn.Module, world: int, shards: int, resharded: bool = True) -> dict[str, int]:
    blocks, root = units(model, shards)
    gathered = (2 if resharded else 1) * blocks + root
    return {"all-gather": world * gathered // shards * B, "reduce-scatter": world * (blocks + root) * B}


def replicated(model: nn.Module, world: int) -> dict[str, int]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return {"all-reduce": world * (sum(p.numel() for p in parameters) * B + 4 * len(parameters))}


def ulysses(world: int, ranks: int, key_heads: int, passes: int = 2) -> dict[str, int]:
    key_heads = math.lcm(key_heads, ranks)
    return {"all-to-all": passes * world * LAYERS * (ROW // ranks) * HEAD * (2 * HEADS + 2 * key_heads) * B}


def exchanged(world: int, experts: int, chosen: int) -> dict[str, int]:
    return {"all-to-all": world * LAYERS * (2 * 2 * ROW * chosen * WIDTH * B + 8 * experts)}


def divided(world: int, tp: int) -> dict[str, int]:
    sums = 2 * world * (2 * LAYERS + 1) * ROW * WIDTH * B
    return {"all-reduce": sums, "all-gather": ROW * VOCABULARY * B * world // tp}


def test_replicas(two_ranks: Ranks) -> None:
    assert run(two_ranks, "llama", {}, {"mode": "ddp"})["step"] == replicated(build("llama"), 2)


@pytest.mark.parametrize("mode", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("resharded", [True, False])
def test_shards(mode: str, resharded: bool, two_ranks: Ranks) -> None:
    found = run(two_ranks, "llama", {}, {"mode": mode, "reshard_after_forward": resharded})
    assert found["step"] == fully_sharded(build("llama"), 2, 2, resharded)
    assert found["norm"] == {"all-gather": 8 * 2}
    assert found["number"] == {"all-reduce": 8 * 2}


def test_parameters_are_padded_to_the_ranks(four_ranks: Ranks) -> None:
    changes = {"intermediate_size": 47, "vocab_size": 65}
    found = run(four_ranks, "llama", {}, {}, changes)
    assert found["step"] == fully_sharded(build("llama", **changes), 4, 4)


def test_shards_in_replicas(four_ranks: Ranks) -> None:
    found = run(four_ranks, "llama", {"dp_replicate": 2})
    blocks, root = units(build("llama"), 2)
    assert found["step"] == fully_sharded(build("llama"), 4, 2) | {"all-reduce": 4 * (blocks + root) // 2 * B}


@pytest.mark.parametrize("key_heads", [2, 1])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_rows_shared_by_ranks(key_heads: int, recompute: str | None, four_ranks: Ranks) -> None:
    options = {"mode": "ddp", "activation_checkpointing": recompute}
    found = run(four_ranks, "llama", {"ulysses": 4}, options, {"num_key_value_heads": key_heads})
    plain = build("llama", num_key_value_heads=key_heads)
    assert found["step"] == ulysses(4, 4, key_heads, passes=3 if recompute else 2) | replicated(plain, 4)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_on_ranks(name: str, four_ranks: Ranks) -> None:
    model, extra = build(name), MODELS[name][1]
    found = run(four_ranks, name, {"ep": 2})
    blocks, root = units(model, 4, without=".experts.")
    own = experts(model, 2)
    shards = {
        "all-gather": (4 * (2 * blocks + root) // 4 + 4 * 2 * own // 2) * B,
        "reduce-scatter": 4 * (blocks + root + own) * B,
    }
    assert found["step"] == exchanged(4, 4, extra["num_experts_per_tok"]) | shards
    assert found["norm"] == {"all-gather": 8 * 4 * 3}, "dense over fsdp, experts over ep and ep_fsdp"


def test_matrices_on_ranks(two_ranks: Ranks) -> None:
    found = run(two_ranks, "llama", {"tp": 2})
    assert found["step"] == divided(2, 2)


def test_logits_that_stay_divided(two_ranks: Ranks) -> None:
    plan = {"tp": {**build("llama").tp_plan, "lm_head": "vocabulary_parallel"}}
    found = run(two_ranks, "llama", {"tp": 2}, {"plan": plan})["step"]
    logits = ROW * VOCABULARY * B
    assert found["all-gather"] < logits, "logits of the whole vocabulary are never joined"
    assert found["all-reduce"] - divided(2, 2)["all-reduce"] < logits
