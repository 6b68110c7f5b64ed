from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from veomni_parallel import (
    MaskRule,
    ParallelError,
    apply_packed_attention,
    build_parallelize_model,
    init_parallel_state,
    packed_attention,
)
from veomni_parallel.packed_attention import sample_bounds, softmax_kernel, stack_pieces

from tests.parallel.families import build_family, loss_of, truth, whole_row

LENGTHS = (13, 7, 400, 1, 300, 300, 65, 20, 19, 18)
RULES = [MaskRule(), MaskRule(window=1), MaskRule(window=6), MaskRule(window=100), MaskRule(chunk=50)]


def bounds_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *accumulate(lengths))


def dense_mask(bounds: tuple[int, ...], rule: MaskRule) -> Tensor:
    """[T, T] by the definition: same sample, not later, within the window or the chunk."""
    position = torch.arange(bounds[-1])
    sample = torch.searchsorted(torch.tensor(bounds[1:]), position, right=True)
    within = position - torch.tensor(bounds)[sample]
    seen = (sample[:, None] == sample) & (position[:, None] >= position)
    if rule.window is not None:
        seen &= position[:, None] - position < rule.window
    if rule.chunk is not None:
        seen &= within[:, None] // rule.chunk == within // rule.chunk
    return seen


def heads(length: int, value_size: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (2, 6), (2, value_size)]
    return [torch.randn(1, h, length, d, generator=generator, dtype=torch.double).requires_grad_() for h, d in shapes]


@pytest.mark.parametrize(
    "kernel",
    [{}, {"softcap": 2.0}, {"sinks": torch.tensor([-0.1, 0.8, -1.4, 0.2], dtype=torch.double)}, {"scaling": 0.3}],
    ids=["plain", "softcap", "sinks", "scaling"],
)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_pieces_give_what_one_mask_of_the_whole_row_gives(rule: MaskRule, kernel: dict[str, Any]) -> None:
    bounds = bounds_of(LENGTHS)
    q, k, v = heads(bounds[-1])
    expected = softmax_kernel(**kernel)(q, k, v, dense_mask(bounds, rule))
    out = packed_attention(q, k, v, bounds, rule, softmax_kernel(**kernel))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_sample_moves_a_bit_of_another(rule: MaskRule) -> None:
    bounds = bounds_of((13, 70, 200, 9))
    q, k, v = (x.detach().float() for x in heads(bounds[-1]))
    before = packed_attention(q, k, v, bounds, rule)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 13:83] += 1
    after = packed_attention(*changed, bounds, rule)
    others = torch.ones(bounds[-1], dtype=torch.bool)
    others[13:83] = False
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before, after)


def test_no_mask_is_larger_than_a_sample_or_two_windows() -> None:
    bounds = bounds_of((5000, 30, 3000))
    full, _ = stack_pieces(bounds, MaskRule(), torch.device("cpu"))
    assert all(stack.mask is None for stack in full)
    sliding, _ = stack_pieces(bounds, MaskRule(window=128), torch.device("cpu"))
    assert max(stack.mask.numel() for stack in sliding if stack.mask is not None) <= 128 * 255
    chunked, _ = stack_pieces(bounds, MaskRule(chunk=128), torch.device("cpu"))
    assert all(stack.mask is None for stack in chunked)


def test_samples_of_similar_length_are_computed_together() -> None:
    stacks, _ = stack_pieces(bounds_of((100, 90, 95, 10, 9, 10)), MaskRule(), torch.device("cpu"))
    assert sorted(stack.n for stack in stacks) == [3, 3]


@pytest.mark.parametrize("ends", [[1, 4], [0, 5, 3], [0], [0, 0]])
def test_bounds_that_do_not_grow_from_zero_are_refused(ends: list[int]) -> None:
    with pytest.raises(ParallelError, match="must grow from 0"):
        sample_bounds(torch.tensor(ends, dtype=torch.int32))


def logits_of(name: str, inner: str, **batch: Any) -> Tensor:
    model = build_family(name, attn_implementation=inner).eval()
    apply_packed_attention(model)
    with torch.no_grad():
        return model(**batch).logits


def inputs() -> dict[str, Any]:
    return {key: value for key, value in whole_row()[0].items() if key not in ("labels", "shift_labels")}


@pytest.mark.slow
def test_flex_attention_is_told_by_a_block_mask() -> None:
    """On CPU torch's flex attention has a forward only."""
    torch.testing.assert_close(
        logits_of("mistral", "flex_attention", **inputs()),
        logits_of("mistral", "eager", **inputs()),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_kernel_of_whole_rows_is_told_chunks_as_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash attention is: it takes cu_seq_lens and a window, and knows nothing of chunks."""
    import transformers

    seen = []

    def whole_rows(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        ends = sample_bounds(kwargs["cu_seq_lens_q"])
        seen.append((mask, len(ends) - 1, kwargs["max_length_q"]))
        return packed_attention(q, k, v, ends, MaskRule(kwargs.get("sliding_window"))), None

    transformers.AttentionInterface.register("whole_rows_of_a_test", whole_rows)
    logits = logits_of("llama4", "whole_rows_of_a_test", **inputs())
    torch.testing.assert_close(logits, logits_of("llama4", "eager", **inputs()), rtol=1e-4, atol=1e-4)
    assert seen == [(None, 20, 5), (None, 8, 20)]  # the first layer is chunked by 5


def test_samples_are_read_off_positions_that_restart() -> None:
    whole = inputs()
    only = {key: whole[key] for key in ("input_ids", "position_ids")}
    assert torch.equal(logits_of("gpt_oss", "eager", **only), logits_of("gpt_oss", "eager", **whole))


def test_positions_that_cannot_tell_are_refused() -> None:
    whole = inputs()
    with pytest.raises(ParallelError, match="give cu_seq_lens_q"):
        logits_of("qwen3_5", "eager", input_ids=whole["input_ids"], position_ids=whole["position_ids"].expand(3, 1, -1))


def test_bounds_of_another_row_are_refused() -> None:
    with pytest.raises(ParallelError, match="input_ids has 84 tokens, but cu_seq_lens_q ends at 85"):
        logits_of("llama", "eager", **{**inputs(), "input_ids": inputs()["input_ids"][:, 1:]})


def test_a_copy_of_the_model_keeps_samples_apart() -> None:
    import copy

    model = build_family("gpt_oss")
    apply_packed_attention(model)
    copied = copy.deepcopy(model)
    row, total = whole_row()
    assert loss_of(copied, row, total).item() == pytest.approx(truth("gpt_oss")[0], rel=1e-5)
    link = copied.model.layers[0].self_attn.packed_place.link
    assert link.decoder is copied.model
    assert not link.silent


@pytest.mark.parametrize("compiled", [False, True])
def test_models_may_share_a_config(compiled: bool) -> None:
    import transformers

    first = build_family("gpt_oss")
    build_parallelize_model(first, init_parallel_state(), compile=compiled)
    torch.manual_seed(0)
    second = transformers.GptOssForCausalLM._from_config(first.config)
    second.load_state_dict(first.state_dict())
    row, total = whole_row()
    before = loss_of(second, row, total).item()
    apply_packed_attention(second)
    assert second.model.layers[0].self_attn.packed_place.link.inner == "eager"
    assert before == loss_of(second, row, total).item() == pytest.approx(truth("gpt_oss")[0], rel=1e-5)


def test_a_saved_model_says_nothing_of_us(tmp_path: Any) -> None:
    model = build_family("llama")
    apply_packed_attention(model)
    model.save_pretrained(tmp_path)
    assert "packed_" not in (tmp_path / "config.json").read_text()


def test_an_attention_that_never_asks_is_refused_in_the_first_packed_step() -> None:
    class HiddenAttention(torch.nn.Module):
        """Knows the registry, but does not use it."""

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
            if kwargs.get("never"):
                ALL_ATTENTION_FUNCTIONS  # noqa: B018, F821
            return hidden_states, None

    model = build_family("llama")
    model.model.layers[1].self_attn = HiddenAttention()
    apply_packed_attention(model)
    with pytest.raises(RuntimeError, match=r"packed, but 1 attention modules of LlamaModel .*layers.1.self_attn"):
        model(**inputs())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("inner", ["sdpa", "flash_attention_2", "flex_attention"])
def test_kernels_of_the_gpu_agree_with_eager(inner: str) -> None:
    if inner == "flash_attention_2":
        pytest.importorskip("flash_attn")
    batch = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in inputs().items()}
    out = []
    for implementation in (inner, "eager"):
        model = build_family("mistral", attn_implementation=implementation).cuda().bfloat16()
        apply_packed_attention(model)
        logits = model(**batch).logits
        logits.float().square().mean().backward()
        out.append((logits, model.model.embed_tokens.weight.grad))
    torch.testing.assert_close(out[0], out[1], rtol=0.1, atol=0.1)
