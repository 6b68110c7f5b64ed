from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from veomni_parallel import ParallelError, apply_packed_attention, apply_ulysses, init_parallel_state
from veomni_parallel.linear_attention import _delta_rule, exchange_halo, linear_attention_modules, takes_cu_seqlens
from veomni_parallel.packed_rows import Place, RowLink
from veomni_parallel.ulysses import row_slices

from tests.parallel.families import build_family, whole_row


def halo(row: int, reach: int) -> tuple[bool, bool]:
    """Equal to the columns before this rank's slice; and each column's gradient is the number of ranks that lack it."""
    state = init_parallel_state(dp_shard=1, ulysses=-1, device_type="cpu")
    link = RowLink(nn.Identity(), "sdpa", state.sp.get_group(), state.sp.size(), state.sp.get_local_rank())
    x = torch.arange(2.0 * row).view(1, 2, row)
    own = link.own(row)
    mine = x[:, :, own].clone().requires_grad_()
    got = exchange_halo(mine, reach, row, link)
    got.sum().backward()
    starts = [sum(row_slices(row, link.ranks)[:rank]) for rank in range(link.ranks)]
    uses = [sum(start - reach <= t < start for start in starts) for t in range(own.start, own.stop)]
    expected = x[:, :, max(0, own.start - reach) : own.start]
    return torch.equal(got, expected), mine.grad is not None and mine.grad[0, 0].tolist() == uses


@pytest.mark.parametrize(("row", "reach"), [(40, 3), (9, 3), (5, 3), (4, 7)])
def test_a_halo_may_reach_over_several_slices(row: int, reach: int, four_ranks: Ranks) -> None:
    assert four_ranks.run(halo, row, reach) == [(True, True)] * 4


def test_a_kernel_that_keeps_samples_apart_itself_is_handed_the_whole_row() -> None:
    """As flash-linear-attention's is, on a GPU."""
    seen = []

    def kernel(q: Any, k: Any, v: Any, *, g: Any, beta: Any, cu_seqlens: torch.Tensor, **kwargs: Any) -> Any:
        seen.append((q.shape[1], cu_seqlens.tolist(), kwargs))
        return v, None

    rule = _delta_rule(kernel, Place(RowLink(nn.Identity(), "sdpa"), "layer"))
    q, v, g = torch.zeros(1, 9, 2, 4), torch.randn(1, 9, 2, 3), torch.zeros(1, 9, 2)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, _ = rule(q, q, v, g=g, beta=g, cu_seqlens=ends, use_qk_l2norm_in_kernel=True)
    assert torch.equal(out, v)
    assert seen == [(9, [0, 4, 9], {"use_qk_l2norm_in_kernel": True})]


def test_the_fallback_of_transformers_is_known_to_refuse_packed_rows() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next

    assert not takes_cu_seqlens(modeling_qwen3_next.torch_chunk_gated_delta_rule)


@pytest.mark.parametrize(
    ("name", "number"), [("qwen3_next", 1), ("qwen3_5", 1), ("qwen3_5_moe", 1), ("lfm2", 1), ("mamba", 0), ("llama", 0)]
)
def test_layers_are_recognised_by_what_they_call(name: str, number: int) -> None:
    assert len(linear_attention_modules(build_family(name).get_decoder())) == number


def test_the_modeling_file_stays_as_it_is() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as file

    before = (file.causal_conv1d_fn, file.torch_chunk_gated_delta_rule, file.Qwen3NextGatedDeltaNet.forward)
    apply_packed_attention(build_family("qwen3_next"))
    assert before == (
        file.causal_conv1d_fn,
        file.torch_chunk_gated_delta_rule,
        file.Qwen3NextGatedDeltaNet.forward,
    )


def message_of(case: str) -> str:
    state = init_parallel_state(dp_shard=1, ulysses=-1, device_type="cpu")
    model = build_family("qwen3_5")
    try:
        if case == "heads":
            model.model.layers[0].linear_attn.num_v_heads = 3
        apply_ulysses(model, state.sp)
        if case == "silent":
            model.model.layers[0].linear_attn.forward = lambda hidden_states, **kwargs: hidden_states
        row, _ = whole_row()
        batch = {key: value for key, value in row.items() if key in ("input_ids", "position_ids", "cu_seq_lens_q")}
        model(**batch)
    except (ParallelError, RuntimeError) as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("heads", "3 value heads (linear_num_value_heads of Qwen3_5GatedDeltaNet) cannot be divided over ulysses=2"),
        ("silent", "(layers.0.linear_attn)"),
        ("none", "accepted"),
    ],
)
def test_a_layer_that_cannot_be_divided_is_named(case: str, words: str, two_ranks: Ranks) -> None:
    for message in two_ranks.run(message_of, case):
        assert words in message
