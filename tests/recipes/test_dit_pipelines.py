"""What a run draws is what the pipeline of diffusers draws, and what it exports is such a pipeline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from veomni_config import ConfigError, DitRecipeConfig, parse_args
from veomni_recipes.diffusion_data import bucket_size
from veomni_recipes.diffusion_pipeline import (
    decode_latents,
    encode_pixels,
    latent_shape,
    load_encoders,
    load_scheduler,
    transformer_config,
)
from veomni_recipes.diffusion_sampling import sample, sample_latents
from veomni_recipes.diffusion_transformers import family_of
from veomni_recipes.smoke_dit import write_tiny_pipeline

STEPS, PROMPT = 3, "a red flower"
FAMILIES = ["FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel", "DiTTransformer2DModel"]


def config(class_name: str, *changes: str) -> DitRecipeConfig:
    return parse_args(
        DitRecipeConfig,
        [
            f"--model.transformer={{_class_name: {class_name}, guidance_embeds: true}}"
            if class_name.startswith("Flux")
            else f"--model.transformer={{_class_name: {class_name}}}",
            *(["--model.scheduler={_class_name: DDIMScheduler}"] if class_name.startswith("DiT") else []),
            "--data.train_path=unused",
            "--train.output_dir=unused",
            "--train.init_device=cpu",
            *changes,
        ],
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each family."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in FAMILIES:
        write_tiny_pipeline(config(name), root / name)
    return {name: root / name for name in FAMILIES}


def their_picture(pipe: Any, noise: torch.Tensor) -> torch.Tensor:
    """What the pipeline of diffusers draws from noise, in -1 .. 1."""
    name = type(pipe).__name__
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt"}
    if name == "DiTPipeline":
        made = pipe([1], generator=torch.Generator().manual_seed(4), **options).images
    elif name == "WanPipeline":
        made = pipe(PROMPT, latents=noise, height=64, width=32, num_frames=5, max_sequence_length=512, **options).frames
        made = made.movedim(1, 2)
    elif name == "FluxPipeline":
        packed = pipe._pack_latents(noise, *noise.shape)
        made = pipe(PROMPT, latents=packed, height=4 * noise.shape[2], width=4 * noise.shape[3], **options).images
    else:
        made = pipe(PROMPT, latents=noise, height=4 * noise.shape[2], width=4 * noise.shape[3], **options).images
    return made * 2 - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_drawing_is_that_of_diffusers_own_pipeline(name: str, folders: dict[str, Path]) -> None:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    pipe.set_progress_bar_config(disable=True)
    settings = {**pipe.transformer.config, "_class_name": name}
    parts = load_encoders(folders[name], settings, (), torch.device("cpu"))
    family = family_of(name)
    size = (64, 32) if name.startswith("Wan") else (32, 32)
    shape = latent_shape(parts, settings, *size, 5)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(4))
    prompt = "flower" if name.startswith("DiT") else PROMPT
    latents = sample_latents(
        partial(family.predict, pipe.transformer, settings),
        settings,
        pipe.scheduler,
        noise,
        {key: value[None] for key, value in family.encode(parts, prompt, None).items()},
        family.encode(parts, "", None),
        steps=STEPS,
        guidance_scale=3.0,
    )
    ours, theirs = decode_latents(parts, latents), their_picture(pipe, noise)
    assert ours.shape == theirs.shape
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_are_scaled_as_the_vae_says(name: str, folders: dict[str, Path]) -> None:
    settings = transformer_config(config(name, f"--model.model_path={folders[name]}").model)
    parts = load_encoders(folders[name], settings, (), torch.device("cpu"))
    pixels = torch.rand(1, 3, 5, 64, 32) if name.startswith("Wan") else torch.rand(1, 3, 64, 32)
    latents = encode_pixels(parts, settings, pixels)
    assert latents.shape[1:] == latent_shape(parts, settings, 64, 32, 5)
    plain = parts.vae.encode(pixels).latent_dist.mode()
    shift = 0.0 if name.startswith("DiT") else 0.1
    expected = (plain - shift) / 2 if name.startswith("Wan") else (plain - shift) * parts.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(decode_latents(parts, latents), parts.vae.decode(plain).sample.clamp(-1, 1))


def test_prompts_are_drawn_from_a_folder_the_same_again(folders: dict[str, Path]) -> None:
    folder = folders["SD3Transformer2DModel"]
    first, second = (sample(folder, [PROMPT, "a temple"], height=32, width=48, num_inference_steps=2) for _ in range(2))
    assert [[frame.size for frame in each] for each in first] == [[(48, 32)]] * 2
    assert [each[0].tobytes() for each in first] == [each[0].tobytes() for each in second]
    assert first[0][0].tobytes() != first[1][0].tobytes()


def test_pictures_get_a_size_near_their_own_aspect() -> None:
    assert bucket_size(4000, 3000, 1024, 64) == (1152, 896)
    assert bucket_size(3000, 4000, 1024, 64) == (896, 1152)
    assert bucket_size(640, 480, 1024, 64) == (640, 512)  # not scaled up
    assert bucket_size(8, 8, 1024, 64) == (64, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model.transformer={_class_name: UNet2DModel}"], r"UNet2DModel given; the recipe knows how to call DiT"),
        (
            ["--model.transformer={_class_name: WanTransformer3DModel, layers: 3}"],
            r"layers: WanTransformer3DModel has no",
        ),
        (["--model.model_path=/nowhere"], "/nowhere is no folder of a diffusers pipeline"),
        (["--model.scheduler={_class_name: NoScheduler}"], "diffusers has no scheduler NoScheduler"),
        (["--model.scheduler={speed: 3}"], "speed: FlowMatchEulerDiscreteScheduler has no such key"),
    ],
)
def test_what_is_not_known_is_named(changes: list[str], message: str) -> None:
    model = config("WanTransformer3DModel", *changes).model
    build = load_scheduler if "scheduler" in changes[0] else transformer_config
    with pytest.raises(ConfigError, match=message):
        build(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--train.micro_batch_size=2", "set micro_batch_size to 1"),
        ("--train.init_device=meta", "set train.init_device to cpu"),
        ("--train.train_architecture=lora", "set model.model_path to a pipeline's folder"),
        ("--data.drop_last=false", "leave data.drop_last at true"),
        ("--model.transformer={_class_name: null}", "nothing says which transformer"),
    ],
)
def test_what_does_not_go_together_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("WanTransformer3DModel", "--train.data_parallel_mode=fsdp2", change)
