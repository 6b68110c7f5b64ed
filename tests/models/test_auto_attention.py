"""Which kernel `attn_implementation="auto"` gives a model, and what the kernel does with what it must not ignore."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from veomni_models import build_foundation_model
from veomni_models.segment_attention import segment_attention

from tests.architectures import tiny_config


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("qwen3", "segments"),
        ("gpt_oss", "segments"),
        ("bloom", "eager"),  # adds its biases to a mask
        ("falcon", "sdpa"),  # looks its attention up in a table of classes
        ("deepseek_v32", "sdpa"),  # selects keys in the mask
        ("inkling2_text", "eager"),  # hands over biases that kernels do not know
    ],
)
def test_auto_is_the_segments_kernel_where_a_model_can_do_with_it(name: str, kernel: str) -> None:
    model = build_foundation_model(tiny_config(name), init_device="meta")
    assert model.config._attn_implementation == kernel


def test_only_the_text_model_attends_causally() -> None:
    model = build_foundation_model(tiny_config("qwen2_5_vl"), init_device="meta")
    assert model.config.text_config._attn_implementation == "segments"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_sinks_count_in_a_padded_batch() -> None:
    q, k, v = (torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    sinks = torch.tensor([0.0, 1.0, 2.0, 3.0])
    got, _ = segment_attention(nn.Identity(), q, k, v, mask, s_aux=sinks)
    for row in range(2):
        alone, _ = segment_attention(
            nn.Identity(), q[row : row + 1], k[row : row + 1], v[row : row + 1], None, s_aux=sinks
        )
        torch.testing.assert_close(got[row : row + 1], alone)


def test_a_packed_row_of_attention_that_looks_ahead_is_refused() -> None:
    x = torch.randn(1, 2, 6, 4)
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="Identity is not causal, so samples of its packed rows need a mask: use sdpa"):
        segment_attention(nn.Identity(), x, x, x, None, cu_seq_lens_q=ends, is_causal=False)
    whole, _ = segment_attention(nn.Identity(), x, x, x, None, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2)
    torch.testing.assert_close(whole, expected)
