"""The omni model of veomni-models over ranks of veomni-parallel: as one process that runs each sample alone."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_models import OmniModel, build_omni_model
from veomni_parallel import build_parallelize_model, init_parallel_state, leak_probe

from tests.models.test_initialization import PARTS
from tests.parallel.parity import gradients_of, worst

IMAGE = PARTS["image_token_id"]
SAMPLES = [(12, 1), (17, 2), (9, 0), (8, 0), (10, 1), (15, 0)]
"""Tokens and pictures; with two data-parallel ranks, one gets all pictures but one, or none if they are left out."""


def build() -> OmniModel:
    return build_omni_model(**PARTS, init_device="cpu", seed=0)


def samples(pictures_of: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    generator, out = torch.Generator().manual_seed(1), []
    for index, (length, pictures) in enumerate(SAMPLES):
        ids = torch.randint(6, 41, (1, length), generator=generator)
        pixels = torch.randn(pictures, 3, 8, 8, generator=generator)
        if index in pictures_of:
            for i in range(pictures):
                ids[0, 1 + 5 * i : 5 + 5 * i] = IMAGE
        else:
            pixels = pixels[:0]
        targets = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
        targets = targets.masked_fill(targets == IMAGE, -100)
        out.append({"input_ids": ids, "shift_labels": targets, "pixel_values": pixels})
    return out


def pack(row: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    lengths = [sample["input_ids"].shape[1] for sample in row]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    pixels = torch.cat([sample["pixel_values"] for sample in row])
    batch: dict[str, Any] = {
        "input_ids": torch.cat([sample["input_ids"] for sample in row], dim=1),
        "shift_labels": torch.cat([sample["shift_labels"] for sample in row], dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


def loss_of(model: Any, batch: dict[str, Any], targets: torch.Tensor, total: int) -> torch.Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "shift_labels"}).logits
    return torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum") / total


def count(row: list[dict[str, torch.Tensor]]) -> int:
    return sum(int((sample["shift_labels"] != -100).sum()) for sample in row)


def step(mode: str, ulysses: int, pictures_of: tuple[int, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    state = init_parallel_state(ulysses=ulysses, device_type="cpu")
    model = build_parallelize_model(build(), state, mode=mode)
    data = samples(pictures_of)
    batch = pack(data[state.dp.get_local_rank() :: state.dp.size()])
    targets = batch["shift_labels"].tensor_split(state.sp.size(), dim=1)[state.sp.get_local_rank()]
    loss = loss_of(model, batch, targets, count(data))
    (loss * state.loss.size()).backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed)
    gradients = gradients_of(model)
    return summed.item(), gradients if state.rank == 0 else {}


@pytest.mark.parametrize(
    ("world", "mode", "ulysses"),
    [(2, "ddp", 1), (2, "fsdp1", 1), (2, "fsdp2", 1), (2, "ddp", 2), (2, "fsdp2", 2), (4, "fsdp2", 2)],
)
@pytest.mark.parametrize("pictures_of", [(0, 1, 4), (0, 4), (1,)], ids=["all", "rank 0 only", "rank 1 only"])
def test_any_layout_is_one_process_with_each_sample_alone(
    world: int, mode: str, ulysses: int, pictures_of: tuple[int, ...], two_ranks: Ranks, four_ranks: Ranks
) -> None:
    loss, gradients = (two_ranks if world == 2 else four_ranks).run(step, mode, ulysses, pictures_of)[0]
    model, data, expected = build(), samples(pictures_of), 0.0
    for sample in data:
        alone = {"input_ids": sample["input_ids"]}
        if len(sample["pixel_values"]):
            alone["pixel_values"] = sample["pixel_values"]
        one = loss_of(model, alone, sample["shift_labels"], count(data))
        one.backward()
        expected += one.item()
    assert loss == pytest.approx(expected, rel=1e-5)
    reference = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    difference, where = worst(gradients, reference)
    assert difference <= 1e-5, f"{where} is off by {difference:.1e}"


def test_a_row_with_pictures_does_not_leak() -> None:
    model = build_parallelize_model(build(), init_parallel_state())
    row = pack(samples((0, 1, 4)))
    del row["shift_labels"]
    assert leak_probe(model, row).same_bits
