from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from veomni_models import ModelError, fused_linear_cross_entropy, use_fused_loss

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 16,
    "pad_token_id": 0,
}


def problem(dtype=torch.float32, rows=700, vocabulary=5003):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 64, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,)).masked_fill(torch.rand(rows) < 0.3, -100)
    return hidden, weight, bias, labels


def softcap(logits):
    return 3 * torch.tanh(logits / 3)


@pytest.mark.parametrize("pointwise", [None, softcap, lambda x: 0.25 * x])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_value_and_gradients_are_those_of_the_whole_logits(monkeypatch, pointwise, z_loss):
    monkeypatch.setattr("veomni_models.fused_cross_entropy._LOGITS_AT_ONCE", 100 * 5003)  # seven parts, the last short
    hidden, weight, bias, labels = problem()
    logits = hidden @ weight.T + bias
    logits = logits if pointwise is None else pointwise(logits)
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    want = (want + z_loss * logits.logsumexp(-1)[labels != -100].square().sum()) / 500
    got = fused_linear_cross_entropy(hidden, weight, labels, 500, bias=bias, pointwise=pointwise, z_loss=z_loss)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight, bias)) for x in (got, want)), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_bfloat16_is_as_near_to_float32_as_the_plain_loss_is():
    hidden, weight, _, labels = problem(torch.bfloat16)
    exact = torch.nn.functional.cross_entropy(hidden.float() @ weight.float().T, labels, reduction="sum")
    plain = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    fused = fused_linear_cross_entropy(hidden, weight, labels, 1)
    grads = [torch.autograd.grad(x, (hidden, weight)) for x in (exact, plain, fused)]
    for exact_grad, plain_grad, fused_grad in zip(*grads, strict=True):
        assert fused_grad.dtype == torch.bfloat16
        error = (fused_grad.float() - exact_grad.float()).norm()
        assert error <= 1.1 * (plain_grad.float() - exact_grad.float()).norm() + 1e-6


def test_a_row_without_targets_gives_zero_and_gradients_of_zero():
    hidden, weight, _, labels = problem()
    loss = fused_linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), 500)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.item() == 0
    assert all(not grad.any() for grad in grads)


def test_frozen_weights_get_no_gradient_and_cost_none():
    hidden, weight, _, labels = problem()
    fused_linear_cross_entropy(hidden, weight.detach(), labels, 1).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_shapes_that_do_not_fit_are_one_sentence():
    hidden, weight, _, labels = problem()
    with pytest.raises(ValueError, match=r"hidden \[700, 64\], weight \[5003, 64\] and labels \[699\]"):
        fused_linear_cross_entropy(hidden, weight, labels[1:], 1)


PEAK = """
import resource, sys, torch
from veomni_models import fused_linear_cross_entropy
h, w = torch.randn(2048, 64, requires_grad=True), torch.randn(151936, 64, requires_grad=True)
y = torch.randint(0, 151936, (2048,))
w.grad = torch.zeros_like(w)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plain = lambda: torch.nn.functional.cross_entropy(h @ w.T, y)
loss = fused_linear_cross_entropy(h, w, y, 2048) if sys.argv[1] == "fused" else plain()
loss.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""


@pytest.mark.slow
def test_it_takes_a_fraction_of_the_memory_of_the_whole_logits():
    peaks = {}
    for kind in ("plain", "fused"):
        run = subprocess.run(
            [sys.executable, "-c", PEAK, kind], capture_output=True, text=True, check=True, timeout=100
        )
        peaks[kind] = int(run.stdout)
    assert peaks["fused"] < 0.25 * peaks["plain"], peaks  # at 4,096 rows it is under a tenth


def build(config, **keys):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**SMALL, **keys), attn_implementation="eager")


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ("Qwen3Config", {}),
        ("Gemma2Config", {"final_logit_softcapping": 5.0, "sliding_window": 6}),
        ("CohereConfig", {"logit_scale": 0.25}),
        ("GraniteConfig", {"logits_scaling": 4.0}),
        ("PhiConfig", {}),
    ],
)
def test_a_model_keeps_its_loss_and_every_gradient(config, keys):
    model = build(getattr(transformers, config), **keys)
    fused = copy.deepcopy(model)
    use_fused_loss(fused)
    ids = torch.randint(1, 128, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    want, got = (m(input_ids=ids, labels=labels, num_items_in_batch=7, use_cache=False) for m in (model, fused))
    assert got.logits is None
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    want.loss.backward()
    got.loss.backward()
    for (name, ours), theirs in zip(fused.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp(min=1e-6), name


def test_without_labels_a_model_gives_its_logits_and_generates():
    model = build(transformers.Qwen3Config)
    ids = torch.tensor([[5, 6, 7]])
    want = model(input_ids=ids).logits
    use_fused_loss(model)
    model(input_ids=ids, labels=ids)
    assert model(input_ids=ids).logits.equal(want)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_a_model_that_uses_its_logits_otherwise_is_refused_in_one_sentence():
    class Own(transformers.Qwen3ForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            hidden = self.model(*args, **kwargs).last_hidden_state
            return self.lm_head(hidden).softmax(-1)

    model = Own(transformers.Qwen3Config(**SMALL))
    use_fused_loss(model)
    with pytest.raises(ModelError, match="softmax to its logits"):
        model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]]))


def test_a_model_without_a_linear_head_is_refused():
    with pytest.raises(ModelError, match="Identity: its output head is NoneType"):
        use_fused_loss(torch.nn.Identity())


def _vocabulary_shards():
    hidden, weight, bias, labels = problem(vocabulary=5000)
    rank, size = dist.get_rank(), dist.get_world_size()
    part = [x.detach().chunk(size)[rank].clone().requires_grad_() for x in (weight, bias)]
    loss = fused_linear_cross_entropy(
        hidden, part[0], labels, 500, bias=part[1], pointwise=softcap, z_loss=1e-3, group=dist.group.WORLD
    )
    grads = torch.autograd.grad(loss, (hidden, *part))
    want = fused_linear_cross_entropy(hidden, weight, labels, 500, bias=bias, pointwise=softcap, z_loss=1e-3)
    wanted = torch.autograd.grad(want, (hidden, weight, bias))
    wanted = (wanted[0], *(x.chunk(size)[rank] for x in wanted[1:]))
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(grads, wanted, strict=True))
    return abs(loss.item() - want.item()) / want.item(), worst


def test_a_vocabulary_that_is_sharded_over_ranks_gives_the_same(two_ranks):
    for value, worst in two_ranks.run(_vocabulary_shards):
        assert value <= 1e-6
        assert worst <= 1e-5
