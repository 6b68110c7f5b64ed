"""How the transformers of diffusers are called: what each family's pipeline does around its own.

Everywhere else latents are [B, C, H, W], of videos [B, C, F, H, W], and timesteps numbers from 0 to 1,000. A family
that is not here is a `Family` more in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from veomni_config import ConfigError, Problem
from veomni_data import DataError

Conditions = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """What is particular to the transformers of a class.

    Attributes:
        pipeline: the class of diffusers that draws with them.
        encode: (pipeline, prompt, most tokens of it or None) -> conditions of one sample, by the names of the
            transformer's arguments.
        predict: (model, config, latents [B, ...], timestep [B], conditions, embedded guidance) -> prediction, as the
            latents.
        patch: (config) -> latent values of a token along frames, height and width.
        even_steps: whether its pipeline spaces the times of a drawing evenly before they are shifted.
        whole: modules that are called outside of their block too, and so are not sharded with it.
    """

    pipeline: str
    encode: Callable[[Any, str, int | None], dict[str, Tensor]]
    predict: Callable[[nn.Module, Any, Tensor, Tensor, Conditions, float], Tensor]
    patch: Callable[[Any], tuple[int, int, int]]
    even_steps: bool = False
    whole: tuple[str, ...] = ()


def family_of(class_name: str) -> Family:
    """The family of a transformer's class.

    Raises:
        ConfigError: it is not known.
    """
    if class_name not in FAMILIES:
        text = f"{class_name} given; the recipe knows how to call {', '.join(FAMILIES)}"
        raise ConfigError([Problem("model.transformer", text)])
    return FAMILIES[class_name]


def count_latent_tokens(config: Any, class_name: str, shape: Sequence[int]) -> int:
    """Tokens of latents [C, H, W] or [C, F, H, W].

    Raises:
        ConfigError: patches do not divide the latents.
    """
    frames, height, width = (1, *shape[1:])[-3:]
    sizes = list(zip((frames, height, width), family_of(class_name).patch(config), strict=True))
    if any(size % patch for size, patch in sizes):
        text = f"latents of {list(shape)} are no whole number of patches of {[patch for _, patch in sizes]}"
        raise ConfigError([Problem("data.bucket_step", f"{text}: set it to a multiple")])
    return int(torch.tensor([size // patch for size, patch in sizes]).prod())


def _predict_plain(
    model: nn.Module, config: Any, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
) -> Tensor:
    out: Tensor = model(hidden_states=latents, timestep=timestep, **conditions, return_dict=False)[0]
    return out[:, : latents.shape[1]]  # the rest, if any, is a variance that schedulers here do not learn


def _predict_flux(
    model: nn.Module, config: Any, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
) -> Tensor:
    n, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    packed = latents.view(n, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, -1)
    grid = [torch.arange(size, device=latents.device, dtype=torch.float32) for size in (1, rows, columns)]
    out: Tensor = model(
        hidden_states=packed,
        timestep=timestep.float() / 1000,
        img_ids=torch.cartesian_prod(*grid),
        txt_ids=grid[0].new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
        guidance=latents.new_full((n,), guidance) if config["guidance_embeds"] else None,
        **conditions,
        return_dict=False,
    )[0]
    return out.view(n, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def _encode_class(pipeline: Any, prompt: str, most: int | None) -> dict[str, Tensor]:
    labels = pipeline.labels
    if prompt and prompt not in labels:
        raise DataError(f"{prompt!r} is none of the classes {', '.join(labels)}", reason="bad prompt")
    return {"class_labels": torch.tensor(labels[prompt] if prompt else pipeline.null_label)}


def _encode_flux(pipeline: Any, prompt: str, most: int | None) -> dict[str, Tensor]:
    words, pooled, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=most or 512)
    return {"encoder_hidden_states": words[0], "pooled_projections": pooled[0]}


def _encode_sd3(pipeline: Any, prompt: str, most: int | None) -> dict[str, Tensor]:
    options = {"do_classifier_free_guidance": False, "max_sequence_length": most or 256}
    words, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, **options)
    return {"encoder_hidden_states": words[0], "pooled_projections": pooled[0]}


def _encode_wan(pipeline: Any, prompt: str, most: int | None) -> dict[str, Tensor]:
    options = {"do_classifier_free_guidance": False, "max_sequence_length": most or 512}
    words, _ = pipeline.encode_prompt(prompt, **options)
    return {"encoder_hidden_states": words[0]}


def _square_patch(config: Any) -> tuple[int, int, int]:
    return 1, config["patch_size"], config["patch_size"]


FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(
        "DiTPipeline", _encode_class, _predict_plain, _square_patch, whole=("transformer_blocks.0.norm1.emb",)
    ),
    "SD3Transformer2DModel": Family("StableDiffusion3Pipeline", _encode_sd3, _predict_plain, _square_patch),
    "FluxTransformer2DModel": Family("FluxPipeline", _encode_flux, _predict_flux, lambda config: (1, 2, 2), True),
    "WanTransformer3DModel": Family(
        "WanPipeline", _encode_wan, _predict_plain, lambda config: tuple(config["patch_size"])
    ),
}
