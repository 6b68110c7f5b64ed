from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from veomni_parallel import (
    LeakReport,
    ParallelError,
    apply_packed_attention,
    build_parallelize_model,
    init_parallel_state,
    leak_probe,
)

from tests.parallel.families import build_family, slice_row, whole_row
from tests.parallel.parity import Batch, Stranger, cut, pack, samples


def inputs(batch: Batch | None = None) -> dict[str, Any]:
    return {key: value for key, value in (batch or whole_row()[0]).items() if key not in ("labels", "shift_labels")}


def test_the_leak_of_plain_gpt_oss_is_found_and_then_gone() -> None:
    model = build_family("gpt_oss")
    found = leak_probe(model, inputs())
    assert {leak.what for leak in found.leaks} == {"logits", "gradients"}
    assert any(leak.changed == 0 and leak.moved == 7 for leak in found.leaks)
    assert str(found).startswith("LEAK: ")
    apply_packed_attention(model)
    report = leak_probe(model, inputs())
    assert not report.leaks
    assert report.samples == 8
    assert str(report).startswith("no leak: whichever of 8 samples changes, all others stay")


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_5", "bloom", "mistral"])
def test_without_experts_no_other_sample_moves_a_bit(name: str) -> None:
    model = build_family(name)
    apply_packed_attention(model)
    assert leak_probe(model, inputs()).same_bits


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = build_family("llama").train()
    model.model.layers[0].eval()
    leak_probe(model, inputs())
    assert model.training
    assert not model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_runs_every_tower_by_itself_in_training_does_so_in_the_probe_too() -> None:
    model = build_family("llama").train()
    model.runs_every_tower = True
    seen: set[tuple[bool, bool]] = set()
    model.register_forward_pre_hook(lambda module, _: seen.add((module.training, module.model.training)))
    leak_probe(model, inputs())
    assert seen == {(True, False)}
    assert model.model.training


def test_placeholders_are_not_replaced() -> None:
    model, row = build_family("llama"), inputs()
    model.config.image_token_id = int(row["input_ids"][0, 3])
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    leak_probe(model, row)
    places = row["input_ids"] == model.config.image_token_id
    assert all(bool((ids[places] == model.config.image_token_id).all()) for ids in seen)
    assert all(int((a != seen[0]).sum()) > 0 for a in seen[1:])


class Blind(Stranger):
    """A stranger that forgets where samples begin."""

    def forward(self, cu_seq_lens_q: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)


@pytest.mark.parametrize(("model", "leaks"), [(Stranger, False), (Blind, True)])
def test_a_model_that_is_not_of_transformers_is_probed_too(model: type[nn.Module], leaks: bool) -> None:
    torch.manual_seed(0)
    row, _ = whole_row()
    assert bool(leak_probe(model(), {**row, "num_items_in_batch": 1}).leaks) == leaks


def wrapped(mode: str, sizes: dict[str, int]) -> LeakReport:
    state = init_parallel_state(**sizes)
    model = build_parallelize_model(build_family("llama"), state, mode=mode)
    own = samples()[state.dp.get_local_rank() :: state.dp.size()]
    own = own[: 4 - state.dp.get_local_rank()]  # ranks with fewer samples than others
    return leak_probe(model, inputs(cut(pack(own), state.sp.get_local_rank(), state.sp.size())))


@pytest.mark.parametrize("sizes", [{}, {"ulysses": 2}], ids=str)
@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_wrapped_models_are_probed_on_every_rank(mode: str, sizes: dict[str, int], two_ranks: Ranks) -> None:
    reports = two_ranks.run(wrapped, mode, sizes)
    assert all(report.same_bits for report in reports)
    assert [report.samples for report in reports] == ([5, 5] if sizes else [4, 3])  # padding is one too


def blind_slices() -> LeakReport:
    """Ulysses whose attention was told of one sample only."""
    import veomni_parallel.packed_rows as rows

    state = init_parallel_state(ulysses=2)
    model = build_parallelize_model(build_family("llama"), state, mode="ddp")
    original = rows.sample_bounds
    rows.sample_bounds = lambda ends: (0, int(ends[-1]))
    try:
        return leak_probe(model, inputs(slice_row(whole_row()[0], state.rank, 2)))
    finally:
        rows.sample_bounds = original


def test_a_leak_between_slices_is_seen_by_all_ranks(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(blind_slices)
    assert first == second
    assert any(leak.changed == 0 and leak.moved == 7 for leak in first.leaks)  # from one rank's tokens to the other's


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 85]), "position_ids": None}, "two or more samples"),
        ({"input_ids": torch.ones(1, 85, dtype=torch.long)}, "no two different ones"),
    ],
)
def test_what_would_prove_nothing_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ParallelError, match=words):
        leak_probe(build_family("llama"), {**inputs(), **change})


def test_gradients_of_a_step_are_not_overwritten() -> None:
    model = build_family("llama")
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    with pytest.raises(ParallelError, match="zero_grad"):
        leak_probe(model, inputs())
