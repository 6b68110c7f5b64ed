"""The load balancing loss of routers is that of the whole batch, however it is spread."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from ranks import Ranks
from veomni_parallel import (
    build_parallelize_model,
    count_targets,
    global_sum,
    init_parallel_state,
    loss_scale,
    router_loss,
)

from tests.parallel.mixtures import build
from tests.parallel.parity import cut, gradients_of, pack, samples, worst

COEFFICIENT = 0.5
NAMES = ("mixtral", "qwen3_moe")


def mixture(name: str) -> Any:
    return build(name, output_router_logits=True, router_aux_loss_coef=COEFFICIENT)


def even_samples() -> list[dict[str, Any]]:
    """Samples of even length: a padded row would hold other tokens than the truth does."""
    return [{key: value[: len(value) // 2 * 2] for key, value in sample.items()} for sample in samples()]


@cache
def truth(name: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, router loss and gradients of one process that sees all samples at once, each attended to alone."""
    model, data = mixture(name), even_samples()
    total = sum(int((sample["shift_labels"] != -100).sum()) for sample in data)
    loss = torch.zeros(())
    logits: list[list[torch.Tensor]] = []
    for sample in data:
        out = model(**pack([sample]), num_items_in_batch=total)
        loss = loss + out.loss - COEFFICIENT * out.aux_loss
        logits.append(list(out.router_logits))
    joined = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    aux = load_balancing_loss_func(joined, 4, 2)
    (loss + COEFFICIENT * aux).backward()
    return (loss + COEFFICIENT * aux).item(), aux.item(), {n: p.grad for n, p in model.named_parameters()}


def step(name: str, sizes: dict[str, int]) -> dict[str, Any]:
    state = init_parallel_state(**sizes, device_type="cpu")
    model = build_parallelize_model(mixture(name), state)
    batch = pack(even_samples()[state.dp.get_local_rank() :: state.dp.size()])
    total = global_sum(count_targets([batch]), state.dp)
    out = model(**cut(batch, state.sp.get_local_rank(), state.sp.size()), num_items_in_batch=total)
    (out.loss * loss_scale(state)).backward()
    return {
        "loss": float(global_sum(out.loss, state.loss)),
        "aux": float(global_sum(out.aux_loss, state.loss)),
        "gradients": gradients_of(model),
    }


@pytest.mark.parametrize("sizes", [{}, {"ulysses": 2}, {"ep": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_router_losses_are_those_of_the_whole_batch(name: str, sizes: dict[str, int], two_ranks: Ranks) -> None:
    loss, aux, gradients = truth(name)
    for got in two_ranks.run(step, name, sizes):
        assert got["loss"] == pytest.approx(loss, rel=1e-5)
        assert got["aux"] == pytest.approx(aux, rel=1e-5)
        difference, where = worst(got["gradients"], gradients)
        assert difference <= 1e-5, f"{where} is off by {difference:.1e}"


def test_micro_batches_weigh_by_their_targets() -> None:
    state = init_parallel_state(device_type="cpu")
    model = build_parallelize_model(mixture("mixtral"), state)
    batch = pack(even_samples())
    whole = model(**batch, num_items_in_batch=count_targets([batch]))
    half = model(**batch, num_items_in_batch=2 * count_targets([batch]))
    torch.testing.assert_close(half.loss * 2, whole.loss)
    torch.testing.assert_close(half.aux_loss * 2, whole.aux_loss)


def parts() -> dict[str, Any]:
    state = init_parallel_state(device_type="cpu")
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1] * 7 + [0] * 3)
    own = slice(0, 3) if state.rank == 0 else slice(3, 10)
    return {
        "sum": float(global_sum(router_loss([logits[own]], 2, state, mask[own]), state.loss)),
        "alone": float(router_loss([logits[:7]], 2, init_parallel_state(dp_replicate=1, device_type="cpu"))),
    }


def test_the_parts_of_ranks_add_up_and_padding_does_not_count(two_ranks: Ranks) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    expected = float(load_balancing_loss_func((logits[:7],), 4, 2))
    for got in two_ranks.run(parts):
        assert got["sum"] == pytest.approx(expected, rel=1e-6)
        assert got["alone"] == pytest.approx(expected / 2, rel=1e-6), "a rank's part of two equal ones"
