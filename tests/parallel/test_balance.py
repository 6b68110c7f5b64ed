"""Dealing the samples of a step so that every kind of work is even, and moving them there and back."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from ranks import Ranks
from scipy.optimize import nnls
from torch import nn
from veomni_parallel import (
    ParallelError,
    balance_over_ranks,
    deal_samples,
    fit_costs,
    global_sum,
    init_parallel_state,
    loss_scale,
)

COUNTS = (5, 0, 1, 9)  # samples of each rank


def skewed(seed: int, samples: int) -> torch.Tensor:
    """[samples, 2]: the work of pictures, which half of the samples have none of, and of text."""
    rng = random.Random(seed)
    pictures = [rng.choice((0.0, rng.lognormvariate(0, 0.7))) for _ in range(samples)]
    return torch.tensor([[p, rng.lognormvariate(0, 0.7)] for p in pictures], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_of_work_is_even(seed: int) -> None:
    costs, ranks = skewed(seed, 128), 8
    dealt = deal_samples(costs, [16] * ranks)
    assert sorted(sample for own in dealt for sample in own) == list(range(128))
    loads = torch.stack([costs[own].sum(0) for own in dealt])
    assert (loads.amax(0) / loads.mean(0)).max() < 1.05
    before = costs.view(ranks, 16, 2).sum(1)
    assert (before.amax(0) / before.mean(0)).min() > 1.2


def test_a_rank_keeps_what_it_has_where_that_is_even_already() -> None:
    costs = torch.tensor([[3.0], [1.0], [2.0], [2.0], [4.0], [4.0]], dtype=torch.float64)
    assert deal_samples(costs, [2, 2, 1, 1]) == [[0, 1], [2, 3], [4], [5]]


def test_one_process_keeps_all() -> None:
    exchange, inverse = balance_over_ranks([3.0, 1.0], init_parallel_state(device_type="cpu").dp)
    assert inverse(exchange(["a", "b"])) == ["a", "b"]
    with pytest.raises(ParallelError, match="has 2 samples to exchange but gave 1"):
        exchange(["a"])


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_fitted_as_scipy_does(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    amounts = torch.rand(40, 4, generator=rng, dtype=torch.float64) * torch.tensor([1.0, 1e3, 1e6, 1.0])
    seconds = amounts @ torch.tensor([0.5, 2e-3, 0.0, 0.1], dtype=torch.float64)
    noisy = seconds + 0.2 * torch.randn(40, generator=rng, dtype=torch.float64)
    expected, _ = nnls(amounts.numpy(), noisy.numpy())
    torch.testing.assert_close(fit_costs(amounts, noisy), torch.from_numpy(expected), rtol=1e-6, atol=1e-12)
    assert (fit_costs(amounts, noisy) >= 0).all()
    with pytest.raises(ParallelError, match="at least as many steps as kinds"):
        fit_costs(amounts[:3], seconds[:3])


def there_and_back() -> dict[str, Any]:
    state = init_parallel_state(device_type="cpu")
    count = COUNTS[state.rank]
    costs = torch.rand(count, 2) + 0.1
    exchange, inverse = balance_over_ranks(costs, state.dp)
    samples = [
        {
            "name": f"{state.rank}.{i}",
            "pixel_values": torch.full((i + 1, 3), float(i), dtype=torch.bfloat16),
            "ids": [torch.arange(i), torch.tensor(state.rank)],
            "empty": torch.zeros(0, 4),
            "mask": torch.tensor([True, False]),
        }
        for i in range(count)
    ]
    dealt = exchange(samples)
    back = inverse([sample | {"seen_by": state.rank} for sample in dealt])
    same = all(
        a["name"] == b["name"]
        and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in ("pixel_values", "mask"))
        and [t.tolist() for t in a["ids"]] == [t.tolist() for t in b["ids"]]
        and b["empty"].shape == (0, 4)
        for a, b in zip(samples, back, strict=True)
    )
    return {"dealt": [s["name"] for s in dealt], "same": same, "after": exchange.after, "before": inverse.after}


def test_samples_of_any_shape_move_there_and_back(four_ranks: Ranks) -> None:
    got = four_ranks.run(there_and_back)
    assert all(rank["same"] for rank in got)
    names = [name for rank in got for name in rank["dealt"]]
    assert sorted(names) == sorted(f"{rank}.{i}" for rank, count in enumerate(COUNTS) for i in range(count))
    assert all(len(rank["dealt"]) > 0 for rank in got)
    assert all(torch.equal(rank["after"], got[0]["after"]) for rank in got)
    assert got[0]["after"].amax(0).sum() < got[0]["before"].amax(0).sum()


class Reader(nn.Module):
    """An encoder of pictures and what reads its features beside tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.embedding = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 1)


def pictures_of(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(i % 3 + 1, 4, generator=generator) for i in range(COUNTS[rank])]


def read(model: Reader, features: list[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The loss of a rank: each of its pictures has its own weight, so that mixing them up would show."""
    total = model.head(tokens).square().sum()
    for i, feature in enumerate(features):
        total = total + (i + 1) * model.head(feature).square().sum()
    return total


def encode_evenly(anchored: bool) -> Any:
    state = init_parallel_state(device_type="cpu")
    model, pictures = Reader(), pictures_of(state.rank)
    exchange, inverse = balance_over_ranks([float(len(p)) for p in pictures], state.dp)
    tokens = model.embedding(torch.tensor([state.rank]))
    encoded = [model.encoder(picture) for picture in exchange(pictures)]
    try:
        if anchored:
            features, tokens = inverse.with_anchor(encoded, tokens)
        else:
            features = inverse(encoded)
    except ParallelError as error:
        return str(error)
    loss = read(model, features, tokens)
    (loss * loss_scale(state)).backward()
    gradients = [global_sum(p.grad, state.dp) / state.dp.size() for p in model.parameters() if p.grad is not None]
    return global_sum(float(loss), state.dp), gradients


def test_encoding_evenly_changes_no_loss_and_no_gradient(four_ranks: Ranks) -> None:
    model, total = Reader(), torch.zeros(())
    for rank in range(4):
        features = [model.encoder(picture) for picture in pictures_of(rank)]
        total = total + read(model, features, model.embedding(torch.tensor([rank])))
    total.backward()
    for loss, gradients in four_ranks.run(encode_evenly, True):
        assert loss == pytest.approx(total.item(), rel=1e-6)
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])


def test_a_rank_that_would_not_take_part_in_backward_is_named(four_ranks: Ranks) -> None:
    for answer in four_ranks.run(encode_evenly, False):
        assert answer.startswith("Rank 1 of the exchange is handed no tensor with a gradient")


def balance_what_does_not_fit(kind: str) -> str:
    state = init_parallel_state(device_type="cpu")
    costs = {"kinds": torch.ones(2, 1 + state.rank), "nan": torch.tensor([1.0, float("nan")])}[kind]
    with pytest.raises(ParallelError) as caught:
        balance_over_ranks(costs, state.dp)
    return str(caught.value)


def test_costs_that_do_not_fit_are_refused_on_all_ranks(two_ranks: Ranks) -> None:
    for answer in two_ranks.run(balance_what_does_not_fit, "kinds"):
        assert "the ranks gave [2, 1], [2, 2]" in answer
    for answer in two_ranks.run(balance_what_does_not_fit, "nan"):
        assert "a finite number from 0 up" in answer
