from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import nn
from veomni_parallel import (
    apply_ulysses,
    build_parallelize_model,
    init_parallel_state,
    plain_attention,
    resolve_sizes,
    ulysses_attention,
)

from tests.parallel import pictures
from tests.parallel.parity import Omni, Stranger, build, cut, pack, samples


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def bare_attention(heads: int, kv_heads: int, value_size: int, dtype: torch.dtype) -> tuple[float, ...]:
    """Largest difference of output and of the gradients of q, k, v from attention over the whole row."""
    state = init_parallel_state(dp_shard=1, ulysses=-1)
    rank, ranks = state.sp.get_local_rank(), state.sp.size()
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 6), (kv_heads, 6), (kv_heads, value_size)]
    whole = [torch.randn(2, h, 4 * ranks, d, generator=generator).to(dtype).requires_grad_() for h, d in shapes]
    expected = attend(*whole)
    weight = torch.randn(expected.shape, generator=generator).to(dtype)
    expected_grads = torch.autograd.grad((expected * weight).sum(), whole)

    own = [x.detach().chunk(ranks, dim=2)[rank].clone().requires_grad_() for x in whole]
    out = ulysses_attention(*own, state.sp.get_group(), attend)
    grads = torch.autograd.grad((out * weight.chunk(ranks, dim=2)[rank]).sum(), own)
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    return tuple((a - b.chunk(ranks, dim=2)[rank]).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize(("heads", "kv_heads", "value_size"), [(4, 4, 6), (4, 2, 6), (4, 1, 6), (8, 2, 4), (12, 6, 6)])
def test_any_ratio_of_heads_and_size_of_values_equals_whole_attention(
    heads: int, kv_heads: int, value_size: int, two_ranks: Ranks, four_ranks: Ranks
) -> None:
    for ranks in (two_ranks, four_ranks):
        for differences in ranks.run(bare_attention, heads, kv_heads, value_size, torch.float32):
            assert max(differences) < 1e-5


def test_bfloat16_travels_too(two_ranks: Ranks) -> None:
    for differences in two_ranks.run(bare_attention, 4, 2, 6, torch.bfloat16):
        assert max(differences) < 0.1


def test_alone_it_is_the_attention_itself() -> None:
    q = torch.randn(1, 2, 3, 4)
    assert torch.equal(ulysses_attention(q, q, q, None, attend), attend(q, q, q))


def message_of(case: str) -> str:
    """The sentence that a wrong use is answered with."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    state = init_parallel_state(ulysses=2)
    try:
        if case == "heads":
            apply_ulysses(build("llama", hidden_size=24, num_attention_heads=3, num_key_value_heads=3), state.sp)
        elif case == "bare heads":
            ulysses_attention(*[torch.zeros(1, 3, 2, 4)] * 3, state.sp.get_group(), attend)
        elif case == "other layers":
            model = build("llama")
            model.config.layer_types = ["full_attention", "linear_attention"]
            apply_ulysses(model, state.sp)
        elif case == "layer without attention":
            model = build("llama")
            model.model.layers[1].self_attn = nn.Identity()
            apply_ulysses(model, state.sp)
        elif case == "not exchangeable":
            config = transformers.BloomConfig(hidden_size=16, n_head=2, n_layer=1, vocab_size=8)
            apply_ulysses(transformers.BloomForCausalLM(config), state.sp)
        elif case == "own attention":
            model = build("llama")
            model.model.layers[1].self_attn = OwnAttention()
            model = build_parallelize_model(model, state, mode="ddp")
            model(**cut(pack(samples()), state.sp.get_local_rank(), 2))
        elif case == "another world":
            build_parallelize_model(build("llama"), replace(state, sizes=resolve_sizes(8)))
        elif case == "heads of a picture":
            build_parallelize_model(pictures.build("flux", num_attention_heads=3), state)
        elif case == "no plan":
            keys = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4}
            build_parallelize_model(diffusers.DiTTransformer2DModel(**keys, norm_num_groups=1), state)
        elif case == "stranger never calls":
            model = Stranger()
            for block in model.blocks:
                block.forward = lambda x, mask: x
            model = build_parallelize_model(model, state)
            model(**cut(pack(samples()), state.sp.get_local_rank(), 2), num_items_in_batch=1)
        else:
            model = build_parallelize_model(build("llama"), state)
            batch = cut(pack(samples()), state.sp.get_local_rank(), 2)
            if case == "not packed":
                del batch["cu_seq_lens_q"]
            elif case == "positions":
                del batch["position_ids"]
            elif case == "mask":
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            elif case == "length":
                batch["input_ids"] = batch["input_ids"][:, 1:]
            elif case == "labels":
                del batch["shift_labels"]
            elif case == "cache":
                batch |= {"use_cache": True, "past_key_values": transformers.DynamicCache(config=model.config)}
            model(**batch, num_items_in_batch=1)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


class OwnAttention(nn.Module):
    """Attention that does not go through the interface: under Ulysses it would see its slice only."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        x = hidden_states[:, None]
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0], None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "heads",
            "ParallelError: 3 attention heads (num_attention_heads of LlamaModel) cannot be divided over ulysses=2",
        ),
        ("bare heads", "ParallelError: 3 attention heads cannot be divided over 2"),
        ("other layers", "it has layers of type linear_attention"),
        ("layer without attention", "layers.1 has no attention module"),
        ("not exchangeable", "BloomModel: its attention does not go through transformers' AttentionInterface"),
        ("own attention", "RuntimeError: Rows are sliced over 2 Ulysses ranks, but 1 attention modules of LlamaModel"),
        ("own attention", "layers.1.self_attn"),
        ("stranger never calls", "RuntimeError: Rows are sliced over Ulysses ranks, but Stranger did not call"),
        ("not packed", "ParallelError: Sequence parallelism needs cu_seq_lens_q"),
        ("positions", "ParallelError: Sequence parallelism needs position_ids"),
        ("mask", "attention_mask must be None"),
        ("length", "input_ids has 42 tokens, but cu_seq_lens_q ends at 86"),
        ("labels", "labels cannot be shifted inside a slice: give shift_labels"),
        ("cache", "A packed row cannot be decoded with a cache: call the model with use_cache=False"),
        ("another world", "The state was built for 8 ranks, but there are 2: call init_parallel_state"),
        ("heads of a picture", "3 attention heads of FluxTransformer2DModel cannot be divided over ulysses=2 ranks"),
        ("no plan", "DiTTransformer2DModel has no context parallel plan in diffusers: use ulysses=1"),
    ],
)
def test_what_would_train_silently_wrong_is_refused(case: str, words: str, two_ranks: Ranks) -> None:
    for message in two_ranks.run(message_of, case):
        assert words in message


def kernels(inner: str) -> dict[str, Any]:
    """Logits of this rank's slice with an inner implementation, and what that implementation saw."""
    import transformers

    seen: list[Any] = []

    def segments(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        ends = kwargs["cu_seq_lens_q"].tolist()
        seen.append((attention_mask, query.shape[2], module.num_key_value_groups))
        rows = [attend(*(x[:, :, a:b] for x in (query, key, value))) for a, b in pairwise(ends)]
        return torch.cat(rows, dim=2).transpose(1, 2), None

    transformers.AttentionInterface.register("segments_of_a_test", segments)
    state = init_parallel_state(dp_shard=1, ulysses=-1)
    model = build("llama", attn_implementation=inner)
    model = build_parallelize_model(model, state, mode="ddp")
    batch = cut(pack(samples()), state.sp.get_local_rank(), state.sp.size())
    with torch.no_grad():
        return {"logits": model(**batch).logits, "seen": seen}


@pytest.mark.parametrize("inner", ["sdpa", "eager", "segments_of_a_test"])
def test_the_inner_kernel_is_the_one_that_was_configured(inner: str, four_ranks: Ranks) -> None:
    results = four_ranks.run(kernels, inner)
    logits = torch.cat([result["logits"] for result in results], dim=1)[:, :85]
    with torch.no_grad():
        alone = torch.cat([build("llama")(**pack([sample])).logits for sample in samples()], dim=1)
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
    if inner == "segments_of_a_test":
        # the whole row, no mask, and heads whose ratio changed because two key heads were repeated for four ranks
        assert results[0]["seen"] == [(None, 88, 1)] * 2


def leak() -> float:
    state = init_parallel_state(ulysses=2)
    model = build_parallelize_model(build("qwen3"), state, mode="ddp")
    row, logits = samples(), []
    for change in (0, 1):
        row[1]["input_ids"] = (row[1]["input_ids"] + change) % 64
        with torch.no_grad():
            logits.append(model(**cut(pack(row), state.sp.get_local_rank(), 2)).logits)
    start = state.sp.get_local_rank() * 43
    others = [t for t in range(43) if not 13 <= start + t < 20]
    return (logits[0] - logits[1])[:, others].abs().max().item()


def test_a_packed_sample_never_sees_another(two_ranks: Ranks) -> None:
    assert two_ranks.run(leak) == [0.0, 0.0]


def generated() -> list[list[int]]:
    state = init_parallel_state(ulysses=2)
    model = build_parallelize_model(build("llama", use_cache=True), state).eval()
    with plain_attention(model), torch.no_grad():
        tokens = model.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=5, do_sample=False)
    model.train()(**cut(pack(samples()), state.sp.get_local_rank(), 2), use_cache=False)  # and it is parallel again
    return tokens.tolist()


def test_generation_runs_with_plain_attention_on_every_rank(two_ranks: Ranks) -> None:
    model = build("llama", use_cache=True).eval()
    expected = model.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=5, do_sample=False).tolist()
    assert two_ranks.run(generated) == [expected, expected]


def tower_attention() -> tuple[str, str]:
    import transformers

    class WithTower(Omni):
        def __init__(self) -> None:
            super().__init__()
            config = transformers.SiglipVisionConfig(
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=4,
                patch_size=2,
            )
            self.vision = transformers.SiglipVisionModel(config)

    model = WithTower()
    apply_ulysses(model, init_parallel_state(ulysses=2).sp)
    return model.vision.config._attn_implementation, model.foundation.config._attn_implementation


def test_a_tower_keeps_its_own_attention(two_ranks: Ranks) -> None:
    assert two_ranks.run(tower_attention) == [("sdpa", "packed_sdpa")] * 2
