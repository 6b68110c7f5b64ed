from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from veomni_models import ModelError, use_fused_loss
from veomni_models.token_losses import keep_token_losses


@pytest.mark.parametrize("fused", [False, True])
def test_the_losses_of_tokens_are_those_of_the_plain_logits_and_change_nothing(fused: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 99, "head_dim": 16}
    config = AutoConfig.for_model("qwen3", **sizes, num_attention_heads=2, num_key_value_heads=1)
    model = AutoModelForCausalLM.from_config(config)
    plain = copy.deepcopy(model)
    if fused:
        use_fused_loss(model)
    losses = keep_token_losses(model)
    ids = torch.randint(0, 99, (2, 17))
    targets = ids.roll(-1, dims=-1).masked_fill(torch.rand(2, 17) < 0.4, -100)
    arguments = {"input_ids": ids, "labels": targets, "shift_labels": targets, "num_items_in_batch": 7}
    out, want = model(**arguments), plain(**arguments)
    rows = torch.nn.functional.cross_entropy(want.logits.flatten(0, 1), targets.flatten(), reduction="none")
    (kept,) = losses.take()
    assert torch.allclose(kept, rows, atol=1e-5)
    assert not losses.take()
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    out.loss.backward()
    want.loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


def test_a_loss_that_is_not_of_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear: its loss"):
        keep_token_losses(torch.nn.Linear(2, 2))
