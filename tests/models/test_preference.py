from __future__ import annotations

import pytest
import torch
import transformers
from veomni_models import (
    Distillation,
    ModelError,
    build_foundation_model,
    dpo_loss,
    fused_linear_distillation,
    fused_linear_log_probs,
    orpo_loss,
    simpo_loss,
    sum_by_sample,
    tiny_config,
    use_log_probs,
)


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    monkeypatch.setattr("veomni_models.fused_cross_entropy._LOGITS_AT_ONCE", 7 * 101)


def problem():
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(101, 16, requires_grad=True)
    bias = torch.randn(101, requires_grad=True)
    labels = torch.randint(0, 101, (50,)).masked_fill(torch.rand(50) < 0.3, -100)
    return hidden, weight, bias, labels


def assert_same(got, want, inputs):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(want.shape)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(want, inputs, cotangent), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_log_probs_and_any_gradient_of_them_are_those_of_the_whole_logits():
    hidden, weight, bias, labels = problem()
    logits = (hidden @ weight.T + bias) / 0.7
    want = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    got = fused_linear_log_probs(hidden, weight, labels, bias=bias, temperature=0.7)
    assert_same(got, want, (hidden, weight, bias))


def test_sums_by_sample_stop_at_the_borders_of_samples():
    values = torch.arange(6.0, requires_grad=True)
    sums = sum_by_sample(values, torch.tensor([0, 1, 4, 6], dtype=torch.int32))
    assert sums.tolist() == [0, 6, 9]
    sums[1].backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 0, 0]


def test_distillation_and_its_gradients_are_those_of_the_whole_logits():
    hidden, weight, _, labels = problem()
    teacher_hidden, teacher_weight = torch.randn(50, 24), torch.randn(101, 24)
    kept = labels != -100
    student = (hidden @ weight.T / 2)[kept].log_softmax(-1)
    teacher = (teacher_hidden @ teacher_weight.T / 2)[kept].log_softmax(-1)
    want = 4 * torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum") / 30
    got = fused_linear_distillation(hidden, weight, teacher_hidden, teacher_weight, labels, 30, temperature=2)
    assert_same(got, want, (hidden, weight))


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    hidden, weight, _, labels = problem()
    loss = fused_linear_distillation(hidden, weight, hidden, weight, labels, 1)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-5


def test_vocabularies_that_differ_are_refused():
    hidden, weight, _, labels = problem()
    with pytest.raises(ValueError, match="must share T and V"):
        fused_linear_distillation(hidden, weight, hidden, weight[1:], labels, 1)


def test_dpo_is_log_two_where_the_policy_is_the_reference_and_falls_with_the_margin():
    chosen, rejected = torch.tensor([-5.0, -6.0]), torch.tensor([-7.0, -3.0])
    loss, margin = dpo_loss(chosen, rejected, chosen, rejected, beta=0.5)
    assert loss.tolist() == pytest.approx([0.693147] * 2, abs=1e-6)
    assert margin.tolist() == [0, 0]
    better, margin = dpo_loss(chosen + 1, rejected, chosen, rejected, beta=0.5)
    assert (better < loss).all()
    assert margin.tolist() == [0.5, 0.5]


def test_dpo_with_wrong_labels_for_half_of_the_pairs_pulls_to_the_reference():
    chosen = torch.tensor([-5.0], requires_grad=True)
    loss, _ = dpo_loss(chosen, torch.tensor([-7.0]), torch.tensor([-5.0]), torch.tensor([-7.0]), label_smoothing=0.5)
    loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(0, abs=1e-7)


def test_ipo_is_zero_at_its_target_margin():
    loss, _ = dpo_loss(torch.tensor([-2.0]), torch.tensor([-7.0]), beta=0.1, kind="ipo")
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_simpo_and_orpo_follow_their_formulas():
    chosen, rejected = torch.tensor([-0.5], requires_grad=True), torch.tensor([-1.5])
    loss, _ = simpo_loss(chosen, rejected, beta=2.0, margin=1.0)
    assert loss.item() == pytest.approx(0.313262, abs=1e-5)  # -log sigmoid(2 * 1 - 1)
    loss, ratio = orpo_loss(chosen, rejected, weight=0.1)
    odds = [p / (1 - p) for p in (0.60653066, 0.22313016)]
    assert ratio.exp().item() == pytest.approx(odds[0] / odds[1], rel=1e-5)
    loss.sum().backward()
    assert chosen.grad.item() < 0


def test_an_unknown_preference_loss_is_refused():
    with pytest.raises(ValueError, match='kind="hinge"'):
        dpo_loss(torch.zeros(1), torch.zeros(1), kind="hinge")


def soft_cap(logits):
    return 3 * torch.tanh(logits / 3)


def test_log_probs_of_capped_logits_and_their_gradients_are_those_of_the_whole_logits():
    hidden, weight, bias, labels = problem()
    logits = soft_cap(hidden @ weight.T + bias) / 0.7
    want = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    got = fused_linear_log_probs(hidden, weight, labels, bias=bias, pointwise=soft_cap, temperature=0.7)
    assert_same(got, want, (hidden, weight, bias))


def tiny(kind, **changes):
    config = tiny_config(transformers.CONFIG_MAPPING[kind]())
    for key, value in changes.items():
        setattr(config, key, value)
    return build_foundation_model(config, init_device="cpu")


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])  # gemma2 caps its logits
def test_a_transformers_model_gives_the_log_probability_of_each_target(kind):
    model = tiny(kind)
    ids = torch.arange(2, 14).view(2, 6)
    targets = ids.roll(-1, 1).masked_fill(torch.arange(12).view(2, 6) % 3 == 0, -100)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    rows = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    want = rows.masked_fill(targets == -100, 0)
    use_log_probs(model)
    got = model(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss
    assert_same(got, want, list(model.parameters()))


def test_what_would_be_added_to_log_probs_or_cannot_be_distilled_is_refused():
    with pytest.raises(ModelError, match=r"adds the loss of its router.*set output_router_logits to false"):
        use_log_probs(tiny("qwen3_moe", output_router_logits=True))
    student = tiny("qwen3")
    with pytest.raises(ModelError, match=r"the student has \d+ tokens and the teacher 40"):
        Distillation(student, tiny("qwen3", vocab_size=40))
    student, teacher = tiny("gemma2"), tiny("gemma2")
    Distillation(student, teacher).begin(student, teacher)
    with pytest.raises(ModelError, match=r"soft-cap.*is not distilled"):
        student(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None], use_cache=False)
