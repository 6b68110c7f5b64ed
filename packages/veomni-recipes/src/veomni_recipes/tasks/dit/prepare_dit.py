"""Encode pictures or videos and their prompts once, so that a diffusion transformer is trained without its encoders.

    torchrun --nproc-per-node 2 -m veomni_recipes.tasks.dit.prepare_dit run.yaml

`data.raw_path` has lines such as {"image": "cat.jpg", "prompt": "a cat"}, or with a "video" instead. What the text
encoders and the VAE of the pipeline in `model.model_path` make of them is written to `data.train_path`, and of
the prompts in `data.eval_raw_path` to `data.eval_path`. A folder that is there stays as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from veomni_config import ConfigError, DitDataConfig, DitRecipeConfig, parse_args
from veomni_data import DataError, Row, build_dataset

from veomni_recipes.diffusion_data import UNCONDITIONAL, read_pixels, write_rows
from veomni_recipes.diffusion_pipeline import (
    encode_pixels,
    latent_shape,
    load_encoders,
    pipeline_folder,
    transformer_config,
)
from veomni_recipes.diffusion_transformers import family_of
from veomni_recipes.distributed import barrier, gather, init_distributed, rank, world_size
from veomni_recipes.launch import ends_with_one_sentence

Tensors = Mapping[str, Tensor]


@ends_with_one_sentence(ConfigError, DataError)
def main(argv: list[str] | None = None) -> None:
    """Encode what is trained on, and what is drawn meanwhile."""
    cfg = parse_args(DitRecipeConfig, argv)
    device = init_distributed()
    wanted = [(cfg.data.raw_path, cfg.data.train_path), (cfg.data.eval_raw_path, cfg.data.eval_path)]
    missing = [(raw, Path(folder)) for raw, folder in wanted if raw and folder and not Path(folder).exists()]
    barrier()
    if not missing:
        print("nothing to do: what data.raw_path and data.eval_raw_path would become is there already", flush=True)
        return

    config = transformer_config(cfg.model)
    folder = pipeline_folder(cfg.model.model_path) if cfg.model.model_path else None
    pipeline = load_encoders(folder, config, cfg.model.labels, device)
    encode = partial(family_of(config["_class_name"]).encode, pipeline)
    for raw, target in missing:
        whole = partial(encode_row, data=cfg.data, pipeline=pipeline, config=config, encode=encode, device=device)
        write_folder(
            build_dataset(raw, transform=whole, root=cfg.data.root),
            target,
            encode("", cfg.data.max_prompt_tokens),
            cfg.data,
        )


def encode_row(
    row: Row, *, data: DitDataConfig, pipeline: Any, config: Mapping[str, Any], encode: Callable[..., Any], device: Any
) -> tuple[str, Tensors]:
    """The prompt of a line, and latents (or, without a picture, their shape) with the prompt's conditions."""
    prompt, pixels = read_pixels(row, data)
    conditions = {name: value.cpu() for name, value in encode(prompt, data.max_prompt_tokens).items()}
    if pixels is not None:
        latents = encode_pixels(pipeline, config, pixels[None].to(device))[0].cpu()
        return prompt, {"latents": latents.contiguous(), **conditions}
    side = max(1, round(data.resolution / data.bucket_step)) * data.bucket_step
    shape = latent_shape(pipeline, config, side, side, data.num_frames)
    return prompt, {"shape": torch.tensor(shape), **conditions}


def write_folder(rows: Any, target: Path, unconditional: Tensors, data: DitDataConfig) -> None:
    """Write a prepared folder, of which each rank encodes its part; it appears under its name when it is whole.

    Raises:
        DataError: on all ranks, where more lines than `data.max_skipped` cannot be read; the others are skipped and
            named.
    """
    partial_folder = target.with_name(f".{target.name}.partial")
    if rank() == 0:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        save_file(
            {name: value.cpu().contiguous() for name, value in unconditional.items()}, partial_folder / UNCONDITIONAL
        )
    barrier()
    faults: list[str] = []
    written = sum(gather(write_rows(_sound(rows, faults), partial_folder, rank())))
    every = [fault for own in gather(faults) for fault in own]
    if len(every) > data.max_skipped * len(rows):
        raise DataError(f"{len(every)} of {len(rows)} lines cannot be used; the first: {every[0]}")
    if rank() == 0:
        print("".join(f"skipped: {fault}\n" for fault in every), end="")
        partial_folder.rename(target)
        print(f"wrote {target}: {written:,} samples", flush=True)
    barrier()


def _sound(rows: Any, faults: list[str]) -> Iterator[tuple[str, Tensors]]:
    for number in range(rank(), len(rows), world_size()):
        try:
            yield rows[number]
        except DataError as error:
            faults.append(str(error))


if __name__ == "__main__":
    main()
