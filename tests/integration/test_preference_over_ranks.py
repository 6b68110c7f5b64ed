"""Preference losses and distillation over ranks: loss and every gradient are those of one process, sample by sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.nn.functional import kl_div, logsigmoid
from veomni_config import DPOTrainConfig
from veomni_data import PackingCollator, slice_for_sequence_parallel
from veomni_models import Distillation, add_adapters, initialize_adapters, use_log_probs
from veomni_parallel import build_parallelize_model, count_targets, global_sum, init_parallel_state, loss_scale
from veomni_recipes.preference import compare, count_pairs

from tests.parallel.parity import TOLERANCE, VOCABULARY, Gradients, build, gradients_of, worst

LAYOUTS: dict[str, tuple[int, dict[str, int], str]] = {
    "fsdp2 2": (2, {}, "fsdp2"),
    "ddp 2": (2, {}, "ddp"),
    "ulysses 2": (2, {"ulysses": 2}, "fsdp2"),
    "dp 2 x ulysses 2": (4, {"ulysses": 2}, "fsdp2"),
}
LOSSES = ("sigmoid", "ipo", "simpo", "orpo")


def pairs() -> list[dict[str, Any]]:
    """Five pairs of answers of different lengths, which begin alike."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for prompt, *lengths in ((4, 9, 5), (3, 4, 8), (6, 11, 10), (2, 3, 3), (5, 6, 12)):
        begin = torch.randint(2, VOCABULARY, (prompt,), generator=generator)
        ids = [torch.cat([begin, torch.randint(2, VOCABULARY, (n,), generator=generator)]) for n in lengths]
        labels = [row.clone() for row in ids]
        for row in labels:
            row[:prompt] = -100
        made.append(
            {
                "input_ids": torch.cat(ids),
                "labels": torch.cat(labels),
                "seq_lens": [len(row) for row in ids],
                "preference": torch.tensor([1, 0]),
            }
        )
    return made


def policy(adapters: bool) -> Any:
    """A model that has moved away from its reference, by all of its weights or by its adapters."""
    model = build("qwen3")
    if adapters:
        add_adapters(model, {"r": 4})
        initialize_adapters(model, 0, "cpu")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model


def options(kind: str) -> DPOTrainConfig:
    return DPOTrainConfig(output_dir="unused", dpo_loss=kind, dpo_beta=0.4, simpo_margin=0.3)


def answers_alone(model: nn.Module) -> list[torch.Tensor]:
    """The log-probabilities of the tokens of each answer, each run alone through transformers."""
    found = []
    for sample in pairs():
        for ids, labels in zip(
            sample["input_ids"].split(sample["seq_lens"]), sample["labels"].split(sample["seq_lens"]), strict=True
        ):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            rows = logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
            found.append(rows[labels[1:] != -100])
    return found


def truth(kind: str, adapters: bool) -> tuple[float, Gradients]:
    """The losses as their papers write them."""
    model, beta = policy(adapters), 0.4
    found = answers_alone(model)
    with torch.no_grad():
        expected = answers_alone(build("qwen3"))
    if kind == "sigmoid":
        ratios = torch.stack([f.sum() - e.sum() for f, e in zip(found, expected, strict=True)])
        loss = -logsigmoid(beta * (ratios[0::2] - ratios[1::2]))
    elif kind == "ipo":
        ratios = torch.stack([f.mean() - e.mean() for f, e in zip(found, expected, strict=True)])
        loss = (ratios[0::2] - ratios[1::2] - 1 / (2 * beta)) ** 2
    else:
        means = torch.stack([f.mean() for f in found])
        chosen, rejected = means[0::2], means[1::2]
        if kind == "simpo":
            loss = -logsigmoid(beta * (chosen - rejected) - 0.3)
        else:
            odds = [mean - torch.log(1 - mean.exp()) for mean in (chosen, rejected)]
            loss = -chosen - beta * logsigmoid(odds[0] - odds[1])
    loss.mean().backward()
    return loss.mean().item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def rows_of(samples: list[dict[str, Any]], part: int, parts: int) -> list[dict[str, Any]]:
    """The micro-batches of a data-parallel rank; the last of them has run dry if the samples do not suffice."""
    own = samples[part::parts]
    return [PackingCollator()(own[:2]), PackingCollator()(own[2:])]


def dpo_step(kind: str, adapters: bool, sizes: dict[str, int], mode: str) -> tuple[float, Gradients]:
    state = init_parallel_state(**sizes, device_type="cpu")
    model, reference = policy(adapters), None
    if not adapters and kind in ("sigmoid", "ipo"):
        reference = build("qwen3").requires_grad_(False)
        use_log_probs(reference)
        reference = build_parallelize_model(reference, state, mode=mode)
    use_log_probs(model)
    model = build_parallelize_model(model, state, mode=mode, activation_checkpointing="full")
    rows = rows_of(pairs()[: 4 if state.dp.size() == 2 else 5], state.dp.get_local_rank(), state.dp.size())
    rows[1] = rows[1] if count_pairs(rows[1]) else PackingCollator()([])
    if state.dp.size() == 2 and state.dp.get_local_rank() == 0:  # one rank has a pair more
        rows[1] = PackingCollator()(pairs()[4:])
    total = global_sum(sum(map(count_pairs, rows)), state.dp)
    assert total == 5
    loss = torch.zeros(())
    for batch in rows:
        part = compare(model, reference, batch, state, options(kind)).losses.sum() / total
        (part * loss_scale(state)).backward()
        loss += part.detach()
    return global_sum(loss, state.dp).item(), gradients_of(model)


def check(got: tuple[float, Gradients], want: tuple[float, Gradients]) -> None:
    assert got[0] == pytest.approx(want[0], rel=TOLERANCE)
    assert got[1].keys() == want[1].keys()
    difference, where = worst(got[1], want[1])
    assert difference <= TOLERANCE, f"{where} is off by {difference:.1e}"


@pytest.mark.parametrize(
    ("kind", "adapters", "layout"),
    [(kind, False, layout) for kind in LOSSES for layout in ("fsdp2 2", "ulysses 2")]
    + [("sigmoid", False, layout) for layout in ("ddp 2", "dp 2 x ulysses 2")]
    + [("sigmoid", True, layout) for layout in LAYOUTS],
)
def test_a_preference_loss_has_the_gradients_of_each_answer_alone(
    kind: str, adapters: bool, layout: str, two_ranks: Ranks, four_ranks: Ranks
) -> None:
    world, sizes, mode = LAYOUTS[layout]
    ranks = two_ranks if world == 2 else four_ranks
    for got in ranks.run(dpo_step, kind, adapters, sizes, mode):
        check(got, truth(kind, adapters))


def test_a_row_without_a_pair_adds_nothing() -> None:
    state = init_parallel_state(device_type="cpu")
    model = build("qwen3")
    use_log_probs(model)
    made = compare(model, None, PackingCollator()([]), state, options("simpo"))
    assert made.losses.shape == (0,)
    made.losses.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def teacher() -> Any:
    return build("qwen3", num_hidden_layers=1, hidden_size=48)


def distill_truth(weight: float) -> tuple[float, Gradients]:
    student, other = build("qwen3"), teacher()
    total = sum(int((s["labels"] != -100).sum()) for s in pairs())
    loss = torch.zeros(())
    for sample in pairs():
        for ids, labels in zip(
            sample["input_ids"].split(sample["seq_lens"]), sample["labels"].split(sample["seq_lens"]), strict=True
        ):
            kept = labels[1:] != -100
            own = student(input_ids=ids[None], use_cache=False).logits[0, :-1][kept]
            with torch.no_grad():
                asked = other(input_ids=ids[None], use_cache=False).logits[0, :-1][kept]
            soft = kl_div((own / 1.7).log_softmax(-1), (asked / 1.7).log_softmax(-1), log_target=True, reduction="sum")
            hard = nn.functional.cross_entropy(own, ids[1:][kept], reduction="sum")
            loss = loss + (weight * 1.7**2 * soft + (1 - weight) * hard) / total
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters()}


def distill_step(weight: float, sizes: dict[str, int], mode: str) -> tuple[float, Gradients]:
    state = init_parallel_state(**sizes, device_type="cpu")
    student, other = build("qwen3"), teacher()
    distillation = Distillation(student, other, temperature=1.7, weight=weight)
    other = build_parallelize_model(other, state, mode=mode)
    student = build_parallelize_model(student, state, mode=mode, activation_checkpointing="full")
    distillation.begin(student, other)
    samples = [{key: s[key] for key in ("input_ids", "labels", "seq_lens")} for s in pairs()]
    rows = rows_of(samples, state.dp.get_local_rank(), state.dp.size())
    total = global_sum(count_targets(rows), state.dp)
    loss = torch.zeros(())
    for batch in rows:
        batch = slice_for_sequence_parallel(batch, state.sp.get_local_rank(), state.sp.size())
        part = student(**batch, num_items_in_batch=total, use_cache=False).loss
        (part * loss_scale(state)).backward()
        loss += part.detach()
    return global_sum(loss, state.loss).item(), gradients_of(student)


@pytest.mark.parametrize(
    ("weight", "layout"),
    [(0.6, "fsdp2 2"), (1.0, "fsdp2 2"), (0.6, "ddp 2"), (0.6, "ulysses 2"), (0.6, "dp 2 x ulysses 2")],
)
def test_a_student_has_the_gradients_of_whole_logits(
    weight: float, layout: str, two_ranks: Ranks, four_ranks: Ranks
) -> None:
    world, sizes, mode = LAYOUTS[layout]
    ranks = two_ranks if world == 2 else four_ranks
    for got in ranks.run(distill_step, weight, sizes, mode):
        check(got, distill_truth(weight))
