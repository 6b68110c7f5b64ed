"""Noise, targets and calls of diffusion transformers: a step over ranks has the gradients of each sample alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from veomni_parallel import (
    ParallelPlan,
    build_parallelize_model,
    global_sum,
    gradient_sync,
    init_parallel_state,
    loss_scale,
)
from veomni_recipes.diffusion import add_noise, draw, drop_conditions, is_flow, noise_shift
from veomni_recipes.diffusion_data import conditions_of, stack_samples
from veomni_recipes.diffusion_pipeline import build_transformer
from veomni_recipes.diffusion_transformers import count_latent_tokens, family_of

from tests.recipes.diffusion_parts import CONFIGS, WORDS, conditions, fill, samples

OPTIONS = {"seed": 5, "step": 7, "condition_dropout": 0.3}
SHIFT, GUIDANCE, TOLERANCE = 3.0, 2.5, 1e-5


def scheduler_of(name: str) -> Any:
    import diffusers

    if name == "dit":
        return diffusers.DDPMScheduler(prediction_type="v_prediction")
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def nothing(name: str) -> dict[str, Tensor]:
    """The conditions of no prompt."""
    if name == "dit":
        return {"class_labels": torch.tensor(5)}
    return conditions(name, torch.Generator().manual_seed(9))


def truth(name: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process that runs each sample alone, by the functions of diffusers."""
    model, scheduler = fill(build_transformer(CONFIGS[name], seed=0)), scheduler_of(name)
    values, total = sum(sample["latents"].numel() for sample in samples(name)), 0.0
    for sample in samples(name):
        latents = sample["latents"][None]
        drawn = draw([sample["id"]], latents.shape[1:], **OPTIONS)
        told = {key: value[None] for key, value in conditions_of(sample).items()}
        if drawn.dropped[0]:
            told = {key: value[None] for key, value in nothing(name).items()}
        if name == "dit":
            timestep = (drawn.time * 1000).long()
            noisy = scheduler.add_noise(latents, drawn.noise, timestep)
            target = scheduler.get_velocity(latents, drawn.noise, timestep)
        else:
            sigma = SHIFT * drawn.time / (1 + (SHIFT - 1) * drawn.time)
            timestep = (sigma * 1000).round()
            noisy = torch.lerp(latents, drawn.noise, (timestep / 1000).item())
            target = drawn.noise - latents
        if name == "flux":
            from diffusers import FluxPipeline

            height, width = latents.shape[-2:]
            out = model(
                hidden_states=FluxPipeline._pack_latents(noisy, 1, 2, height, width),
                timestep=timestep / 1000,
                guidance=torch.tensor([GUIDANCE]),
                img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
                txt_ids=torch.zeros(WORDS, 3),
                **told,
            ).sample
            predicted = FluxPipeline._unpack_latents(out, height, width, 1)
        else:
            predicted = model(hidden_states=noisy, timestep=timestep, **told).sample[:, :2]
        loss = F.mse_loss(predicted, target, reduction="sum") / values
        loss.backward()
        total += loss.item()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(name: str, sizes: dict[str, int], mode: str) -> tuple[float, dict[str, Tensor]]:
    """The same samples over ranks, as the recipe makes a step of them: batches of one size."""
    state = init_parallel_state(**sizes, device_type="cpu")
    config, scheduler = CONFIGS[name], scheduler_of(name)
    model: nn.Module = fill(build_transformer(config, seed=0))
    plan = ParallelPlan(no_shard=family_of(config["_class_name"]).whole)
    model = build_parallelize_model(model, state, mode=mode, plan=plan, activation_checkpointing="full")
    own = samples(name)
    rows = [own[0:2], own[2:4], own[4:6], own[6:8]][state.dp.get_local_rank() :: state.dp.size()]
    batches = [stack_samples([{**s, "shape": s["latents"].shape, "input_ids": [0]} for s in row]) for row in rows]
    values = global_sum(sum(batch["latents"].numel() for batch in batches), state.dp)
    loss = torch.zeros(())
    for i, batch in enumerate(batches):
        drawn = draw(batch["ids"], batch["latents"].shape[1:], **OPTIONS)
        shift = noise_shift(scheduler, 16)
        noisy, timestep, target = add_noise(scheduler, batch["latents"], drawn.noise, drawn.time, shift)
        told = drop_conditions(conditions_of(batch), nothing(name), drawn.dropped)
        with gradient_sync(model, enabled=i == len(batches) - 1):
            predict = partial(family_of(config["_class_name"]).predict, model, config)
            part = F.mse_loss(predict(noisy, timestep, told, GUIDANCE), target, reduction="sum") / values
            (part * loss_scale(state)).backward()
        loss += part.detach()
    gradients = {
        name.removeprefix("module."): (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return global_sum(loss, state.dp).item(), gradients


def assert_close(found: tuple[float, dict[str, Tensor]], name: str) -> None:
    loss, expected = truth(name)
    assert found[0] == pytest.approx(loss, rel=TOLERANCE)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert expected.keys() <= found[1].keys()
    worst = max((found[1][key] - expected[key]).abs().max() for key in expected)
    assert worst / largest < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_one_rank_has_the_gradients_of_each_sample_alone(name: str) -> None:
    assert_close(step(name, {}, "ddp"), name)


IN_EVERY_RUN = {("flux", "ddp"), ("sd3", "fsdp2"), ("dit", "fsdp2"), ("wan", "ulysses")}
LAYOUTS = {
    "ddp": ({}, "ddp"),
    "fsdp2": ({}, "fsdp2"),
    "ulysses": ({"ulysses": 2}, "fsdp2"),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=() if (name, layout) in IN_EVERY_RUN else pytest.mark.slow)
        for name in CONFIGS
        for layout in LAYOUTS
        if layout != "ulysses" or name in ("flux", "wan")
    ],
)
def test_two_ranks_have_the_gradients_of_each_sample_alone(name: str, layout: str, two_ranks: Ranks) -> None:
    first, second = two_ranks.run(step, name, *LAYOUTS[layout])
    assert first[0] == second[0]
    assert_close(first, name)


def test_noise_depends_on_seed_step_and_sample_alone() -> None:
    together = draw([1, 2, 3], (2, 4), seed=0, step=5)
    for index, sample in enumerate([1, 2, 3]):
        alone = draw([sample], (2, 4), seed=0, step=5)
        assert torch.equal(together.noise[index], alone.noise[0])
        assert together.time[index] == alone.time[0]
    for changed in ({"seed": 1, "step": 5}, {"seed": 0, "step": 6}):
        assert not torch.isclose(draw([1, 2, 3], (2, 4), **changed).noise, together.noise).any()


@pytest.mark.parametrize(("options", "quartile"), [({"sampling": "uniform"}, 0.25), ({"logit_mean": 0.5}, 0.4565)])
def test_times_are_drawn_as_named_and_as_many_conditions_are_dropped_as_wanted(
    options: dict[str, Any], quartile: float
) -> None:
    # a quarter of normal numbers is below -0.6745: sigmoid(0.5 - 0.6745) = 0.4565
    drawn = draw(range(8000), (1,), seed=0, step=1, condition_dropout=0.2, **options)
    assert drawn.time.quantile(0.25).item() == pytest.approx(quartile, abs=0.015)
    assert drawn.dropped.float().mean().item() == pytest.approx(0.2, abs=0.015)
    assert drawn.noise.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_is_that_of_diffusers(kind: str) -> None:
    import diffusers

    scheduler = diffusers.DDIMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    latents, noise, time = torch.randn(5, 3, 4), torch.randn(5, 3, 4), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    noisy, timestep, target = add_noise(scheduler, latents, noise, time)
    assert timestep.tolist() == [0, 100, 500, 900, 999]
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timestep))
    expected = {"epsilon": noise, "v_prediction": scheduler.get_velocity(latents, noise, timestep), "sample": latents}
    torch.testing.assert_close(target, expected[kind])


def test_flows_follow_the_scheduler_and_its_shift() -> None:
    import diffusers

    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert noise_shift(flow, 1000) == 3.0
    moving = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert noise_shift(moving, 4096) == pytest.approx(torch.tensor(1.15).exp().item())
    wan = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    assert is_flow(wan)
    assert noise_shift(wan, 1000) == 5.0
    latents, noise = torch.zeros(1, 4), torch.ones(1, 4)
    noisy, timestep, target = add_noise(flow, latents, noise, torch.tensor([0.5]), 3.0)
    assert timestep.item() == 750  # 3 * 0.5 / (1 + 2 * 0.5)
    assert noisy.unique().item() == pytest.approx(0.75)
    assert torch.equal(target, noise)


def test_tokens_are_counted_in_patches() -> None:
    flux, wan = CONFIGS["flux"], CONFIGS["wan"]
    assert count_latent_tokens(flux, flux["_class_name"], (2, 8, 4)) == 8
    assert count_latent_tokens({**wan, "patch_size": (1, 2, 2)}, wan["_class_name"], (2, 3, 8, 4)) == 24
