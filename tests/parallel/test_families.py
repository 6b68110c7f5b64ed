"""Packed rows of many families give the loss and every gradient of each sample alone through the untouched model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_parallel import apply_packed_attention, apply_ulysses, build_parallelize_model, init_parallel_state

from tests.parallel.families import TEXT, build_family, loss_of, slice_row, truth, whole_row
from tests.parallel.parity import Gradients, worst

TOLERANCE = 1e-5
SLICED = [name for name in TEXT if name not in ("bloom", "mamba")]


def assert_true(name: str, loss: float, gradients: Gradients) -> None:
    expected, reference = truth(name)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    difference, where = worst(gradients, reference)
    assert difference <= TOLERANCE, f"{where} is off by {difference:.1e}"


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inner", ["default", "eager"])
@pytest.mark.parametrize("name", TEXT)
def test_a_packed_row_on_one_process_is_its_samples_alone(name: str, inner: str) -> None:
    model = build_family(name, **({} if inner == "default" else {"attn_implementation": inner}))
    apply_packed_attention(model)
    row, total = whole_row()
    loss = loss_of(model, row, total)
    loss.backward()
    assert_true(name, loss.item(), gradients_of(model))


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "lfm2", "bloom", "mamba"])
def test_the_plain_model_leaks_where_we_do_not(name: str) -> None:
    row, total = whole_row()
    with torch.no_grad():
        assert abs(loss_of(build_family(name), row, total).item() / truth(name)[0] - 1) > TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "qwen3_next"])
def test_padded_batches_and_generation_are_as_before(name: str) -> None:
    plain = build_family(name).eval()
    ours = copy.deepcopy(plain)
    apply_packed_attention(ours)
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(ours(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected)
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    for batch in (ids[1:], ids):
        generated = [m.generate(batch, max_new_tokens=5, do_sample=False, use_cache=True) for m in (plain, ours)]
        assert torch.equal(*generated)


def sliced(name: str, inner: str | None = None) -> tuple[float, Gradients]:
    state = init_parallel_state(dp_shard=1, ulysses=-1)
    model = build_family(name, **({"attn_implementation": inner} if inner else {}))
    apply_ulysses(model, state.sp)
    row, total = whole_row()
    loss = loss_of(model, slice_row(row, state.sp.get_local_rank(), state.sp.size()), total)
    loss.backward()
    summed = loss.detach().clone()
    for tensor in [summed, *(p.grad for p in model.parameters() if p.grad is not None)]:
        dist.all_reduce(tensor)
    return summed.item(), gradients_of(model) if state.rank == 0 else {}


@pytest.mark.parametrize("name", SLICED)
def test_a_row_of_any_length_sliced_over_two_ranks_is_its_samples_alone(name: str, two_ranks: Ranks) -> None:
    assert_true(name, *two_ranks.run(sliced, name)[0])


@pytest.mark.parametrize("name", SLICED)
def test_a_row_of_any_length_sliced_over_four_ranks_is_its_samples_alone(name: str, four_ranks: Ranks) -> None:
    assert_true(name, *four_ranks.run(sliced, name)[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "qwen3_5"])
def test_the_eager_kernel_inside_is_as_exact(name: str, two_ranks: Ranks) -> None:
    assert_true(name, *two_ranks.run(sliced, name, "eager")[0])


def data_parallel(name: str, recompute: bool) -> tuple[float, Gradients]:
    """Two ranks with uneven rows: what a user of gpt-oss gets from the plain data-parallel wrapper."""
    from tests.parallel.parity import pack, samples

    state = init_parallel_state()
    model = build_family(name)
    model = build_parallelize_model(model, state, mode="ddp", activation_checkpointing="full" if recompute else None)
    _, total = whole_row()
    loss = loss_of(model, pack(samples()[state.rank :: 2]), total)
    (loss * 2).backward()
    summed = loss.detach().clone()
    dist.all_reduce(summed)
    return summed.item(), {name.removeprefix("module."): grad for name, grad in gradients_of(model).items()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "qwen3_5", "bloom"])
def test_the_wrapper_keeps_samples_apart_too(name: str, recompute: bool, two_ranks: Ranks) -> None:
    assert_true(name, *two_ranks.run(data_parallel, name, recompute)[0])
