"""Exchanges that are under way while heads are projected: the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_parallel import ParallelError, apply_ulysses, build_parallelize_model, init_parallel_state
from veomni_parallel.all_to_all import PendingAllToAll, all_to_all
from veomni_parallel.overlapped_attention import can_overlap

from tests.parallel.families import TEXT, build_family, loss_of, slice_row, truth, whole_row
from tests.parallel.parity import Gradients, gradients_of, worst

TOLERANCE = 1e-5
FIT = ["llama", "llama, one key head", "qwen3", "mistral", "gpt_oss", "gemma3"]


def overlapped(name: str, mode: str | None, recompute: bool) -> list[tuple[float, Gradients, int]]:
    """Two steps: the first runs as before, the second overlaps. Loss, gradients and exchanges begun early."""
    state = init_parallel_state(dp_shard=1, ulysses=-1)
    model: Any = build_family(name)
    apply_ulysses(model, state.sp, overlap=True)
    if mode is not None:
        checkpointing = "full" if recompute else None
        model = build_parallelize_model(model, state, mode=mode, activation_checkpointing=checkpointing)
    row, total = whole_row()
    batch = slice_row(row, state.sp.get_local_rank(), state.sp.size())
    begun: list[int] = []
    original = PendingAllToAll.start
    PendingAllToAll.start = lambda self, *args: (begun.append(1), original(self, *args))[1]  # type: ignore[method-assign]
    out = []
    try:
        for _ in range(2):
            begun.clear()
            loss = loss_of(model, batch, total)
            (loss * (1 if mode is None else state.loss.size())).backward()
            gradients = gradients_of(model)
            if mode is None:
                for gradient in gradients.values():
                    dist.all_reduce(gradient)
            summed = loss.detach().clone()
            dist.all_reduce(summed)
            out.append((summed.item(), gradients if state.rank == 0 else {}, len(begun)))
            model.zero_grad()
    finally:
        PendingAllToAll.start = original  # type: ignore[method-assign]
    return out


def assert_true(name: str, loss: float, gradients: Gradients) -> None:
    expected, reference = truth(name)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    difference, where = worst(gradients, reference)
    assert difference <= TOLERANCE, f"{where} is off by {difference:.1e}"


@pytest.mark.parametrize("name", FIT)
def test_overlapping_changes_no_number(name: str, two_ranks: Ranks) -> None:
    first, second = two_ranks.run(overlapped, name, None, False)[0]
    assert_true(name, *first[:2])
    assert_true(name, *second[:2])
    # in each of two layers, forward and backward: values, keys, two groups of queries, two results
    assert second[2] == 2 * 2 * 6


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_four_ranks_with_one_head_each_overlap_keys_with_queries(name: str, four_ranks: Ranks) -> None:
    _, second = four_ranks.run(overlapped, name, None, False)[0]
    assert_true(name, *second[:2])
    assert second[2] == 2 * 2 * 4  # heads of a rank cannot be halved


@pytest.mark.parametrize("mode", ["fsdp2", "ddp"])
def test_it_is_recomputed_as_it_was_computed(mode: str, two_ranks: Ranks) -> None:
    for step in two_ranks.run(overlapped, "qwen3", mode, True)[0]:
        assert_true("qwen3", *step[:2])


def test_a_layer_that_is_computed_otherwise_keeps_its_own_forward(two_ranks: Ranks) -> None:
    """Cohere 2 rotates in its sliding layers only, which its modules do not show."""
    _, second = two_ranks.run(overlapped, "cohere2", None, False)[0]
    assert_true("cohere2", *second[:2])
    assert second[2] == 2 * 6  # one of two layers


def message_of(name: str, break_it: bool) -> str:
    state = init_parallel_state(dp_shard=1, ulysses=-1)
    model = build_family(name)
    try:
        apply_ulysses(model, state.sp, overlap=True)
        if break_it:
            for layer in model.model.layers:  # heads that know how many they are
                norm = layer.self_attn.q_norm
                norm.register_forward_hook(lambda module, args, output: output * (1 + output.shape[-2] % 4))
        row, total = whole_row()
        for _ in range(2):
            loss_of(model, slice_row(row, state.sp.get_local_rank(), state.sp.size()), total)
    except ParallelError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("name", "break_it", "words"),
    [
        ("deepseek_v3", False, "DeepseekV3Attention is of another form: use overlap=False"),
        ("qwen3", True, "possible in no layer (computing it by head groups gives other numbers)"),
        ("qwen3", False, "accepted"),
    ],
)
def test_attention_that_cannot_is_refused_by_name(name: str, break_it: bool, words: str, two_ranks: Ranks) -> None:
    for message in two_ranks.run(message_of, name, break_it):
        assert words in message


def test_the_form_is_recognised() -> None:
    fit = {
        name
        for name in TEXT
        if any(can_overlap(m) for m in build_family(name).modules() if "Attention" in type(m).__name__)
    }
    assert set(FIT) <= fit
    assert not fit & {"deepseek_v3", "qwen3_next", "qwen3_5", "llama4", "phi3", "bloom"}


def pending() -> bool:
    group, rank = dist.group.WORLD, dist.get_rank()
    x = torch.randn(6, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    send, receive = ([1, 5], [1, 4]) if rank == 0 else ([4, 2], [5, 2])
    at_once = all_to_all(x, send, receive, group)
    weight = torch.arange(1.0, len(at_once) + 1)
    (expected,) = torch.autograd.grad((at_once * weight).sum(), x)
    exchange = PendingAllToAll(x, send, receive, group)
    torch.randn(50, 50) @ torch.randn(50, 50)  # something else in between
    later = exchange.wait()
    (got,) = torch.autograd.grad((later * weight).sum(), x)
    return torch.equal(at_once, later) and torch.equal(expected, got)


def test_an_exchange_begun_early_gives_what_it_gives_at_once(two_ranks: Ranks) -> None:
    assert two_ranks.run(pending) == [True, True]
