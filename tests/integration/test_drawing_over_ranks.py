"""Omni models that draw, over ranks: as one process that runs each sample alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_data import slice_for_sequence_parallel
from veomni_parallel import build_parallelize_model, init_parallel_state, leak_probe

from tests.models.drawing_parts import DECODERS, SEED, build, count, pack, reference, samples
from tests.parallel.parity import gradients_of, worst


def step(way: str, mode: str, ulysses: int, deal: tuple[tuple[int, ...], ...]) -> tuple[float, dict[str, torch.Tensor]]:
    """`deal`: the samples of each data-parallel rank."""
    state = init_parallel_state(ulysses=ulysses, device_type="cpu")
    model = build_parallelize_model(build(way), state, mode=mode)
    data = samples()
    batch = pack([data[i] for i in deal[state.dp.get_local_rank()]])
    batch = slice_for_sequence_parallel(batch, state.sp.get_local_rank(), state.sp.size())
    loss = model(**batch, num_items_in_batch=count(data), noise_seed=SEED, use_cache=False).loss
    (loss * state.loss.size()).backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed)
    gradients = gradients_of(model)
    return summed.item(), gradients if state.rank == 0 else {}


EVEN, ONE_DRAWS = ((0, 1, 2), (3, 4, 5)), ((1, 3, 4), (0, 2, 5))


@pytest.mark.parametrize(
    ("mode", "ulysses", "deal"),
    [
        ("fsdp2", 1, EVEN),
        ("fsdp2", 1, ONE_DRAWS),
        ("ddp", 1, ONE_DRAWS),
        ("fsdp2", 2, ((0, 1, 2, 3, 4, 5),)),
        ("ddp", 2, ((5, 4, 3, 2, 1, 0),)),
    ],
)
@pytest.mark.parametrize("way", DECODERS)
def test_any_layout_is_one_process_with_each_sample_alone(
    way: str, mode: str, ulysses: int, deal: tuple[tuple[int, ...], ...], two_ranks: Ranks
) -> None:
    loss, gradients = two_ranks.run(step, way, mode, ulysses, deal)[0]
    expected, wanted = reference(way, samples())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert wanted.keys() <= gradients.keys()
    difference, where = worst(gradients, wanted)
    assert difference <= 1e-5, f"{where} is off by {difference:.1e}"


@pytest.mark.parametrize("way", DECODERS)
def test_a_row_with_drawings_does_not_leak(way: str) -> None:
    model = build_parallelize_model(build(way), init_parallel_state())
    row = pack(samples())
    assert leak_probe(model, {key: value for key, value in row.items() if "labels" not in key}).same_bits
