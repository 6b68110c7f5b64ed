"""Latents and encoded prompts on the disk, and as the micro-batches that a diffusion transformer learns from.

A folder that `prepare_dit` wrote holds `part-*.arrow`, whose rows are a `prompt` and `tensors`: a safetensors file of
`latents` (or, for a prompt that is only to be drawn, their `shape`) and of the prompt's conditions, by the names of the
transformer's arguments. `unconditional.safetensors` beside them are the conditions of no prompt at all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor
from veomni_data import Batch, DataError, Row, Sample, load_picture, load_video

if TYPE_CHECKING:
    from PIL.Image import Image
    from veomni_config import DitDataConfig

UNCONDITIONAL = "unconditional.safetensors"
_OWN = ("input_ids", "id", "latents", "tokens", "ids", "shape", "prompt")
_ROWS_A_BATCH, _BATCHES_A_SHARD = 64, 32


def read_sample(row: Row, count_tokens: Callable[[Sequence[int]], int]) -> Sample:
    """A row of a prepared folder as a sample.

    Args:
        row: with `tensors` and `prompt`.
        count_tokens: of latents of a shape.

    Returns:
        `latents` [C, H, W] or [C, F, H, W], or their `shape`; each condition; the `prompt`; `id`, a number that is the
        same wherever the sample lies; and `input_ids`, one for each latent token, by which the loader counts.

    Raises:
        DataError: the row is no such row.
    """
    packed = row.get("tensors", b"")
    try:
        tensors = load(packed)
    except Exception as error:  # whatever a damaged row holds
        raise DataError(f"no tensors as prepare_dit writes them: {error}", reason="bad row") from error
    shape = tuple(tensors["latents"].shape) if "latents" in tensors else tuple(tensors.pop("shape").tolist())
    own = int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "big")
    return {"input_ids": range(count_tokens(shape)), "id": own, "shape": shape, "prompt": row["prompt"], **tensors}


def shape_of(sample: Sample) -> tuple[int, ...]:
    """The shape of a sample's latents, by which samples share a batch."""
    return tuple(sample["shape"])


def stack_samples(samples: Sequence[Sample]) -> Batch:
    """Samples of one shape as a batch: `latents` [B, ...], the conditions [B, ...], `ids` and `tokens` of them all.

    Of no samples, as on a rank that has run dry of held-out ones, it is empty.

    Raises:
        DataError: shapes differ, or a sample is a prompt alone.
    """
    if not samples:
        return {}
    for sample in samples:
        if "latents" not in sample:
            raise DataError(f"{sample['prompt']!r} is a prompt without latents, which can be drawn but not learnt from")
    shapes = {shape_of(sample) for sample in samples}
    if len(shapes) != 1:
        text = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise DataError(f"latents of {text} in one batch: set train.dyn_bsz to true, which batches those of one size")
    names = [name for name in samples[0] if name not in _OWN or name == "latents"]
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    return {name: torch.stack([sample[name] for sample in samples]) for name in names} | {
        "ids": [sample["id"] for sample in samples],
        "tokens": tokens,
    }


def conditions_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of a batch or sample the transformer is told beside latents and time."""
    return {name: value for name, value in batch.items() if name not in _OWN}


def read_unconditional(folder: str | Path) -> dict[str, Tensor]:
    """The conditions of no prompt at all.

    Raises:
        DataError: the folder has none.
    """
    path = Path(folder) / UNCONDITIONAL
    try:
        return load_file(path)
    except Exception as error:
        raise DataError(f"{path} cannot be read ({error}): write the folder by prepare_dit") from error


def write_rows(rows: Iterable[tuple[str, Mapping[str, Tensor]]], folder: Path, rank: int = 0) -> int:
    """Write prompts and tensors as Arrow files of a folder; returns how many there were."""
    import pyarrow as pa  # type: ignore[import-untyped]

    schema, written = pa.schema([("prompt", pa.string()), ("tensors", pa.binary())]), 0
    packed = ({"prompt": prompt, "tensors": save({**tensors})} for prompt, tensors in rows)
    parts = iter(lambda: list(islice(packed, _ROWS_A_BATCH)), [])
    for number in count():
        if (first := next(parts, None)) is None:
            break
        path = folder / f"part-{rank:03}-{number:05}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for part in chain([first], islice(parts, _BATCHES_A_SHARD - 1)):
                writer.write_batch(pa.RecordBatch.from_pylist(part, schema))
                written += len(part)
    return written


def read_pixels(row: Row, data: DitDataConfig) -> tuple[str, Tensor | None]:
    """The prompt of a line, and its picture [3, H, W] or video [3, F, H, W] in -1 .. 1, in the size of its bucket.

    Pictures are scaled to cover that size, and what lies outside of its middle is cut off.

    Raises:
        DataError: there is no prompt, or what the line names cannot be read.
    """
    prompt = row.get(data.text_keys or "prompt")
    if not isinstance(prompt, str):
        raise DataError(f'there is no text "{data.text_keys}": the prompt of a picture', reason="bad row")
    if row.get("video") is not None:
        frames = load_video(row["video"], row.folder, row.root, fps=data.fps).frames[: data.num_frames]
        if len(frames) < data.num_frames:
            text = f"{len(frames)} frames at data.fps={data.fps:g}, fewer than data.num_frames={data.num_frames}"
            raise DataError(f"the video has {text}", reason="short video")
        from PIL.Image import fromarray

        pictures = [fit(fromarray(frame), data.resolution, data.bucket_step) for frame in frames]
        return prompt, torch.stack([pixels(picture) for picture in pictures], dim=1)
    if row.get(data.image_keys) is None:
        return prompt, None
    picture = load_picture(row[data.image_keys], row.folder, row.root)
    return prompt, pixels(fit(picture, data.resolution, data.bucket_step))


def fit(picture: Image, side: int, step: int) -> Image:
    """A picture of the size of its bucket."""
    from PIL import ImageOps

    return ImageOps.fit(picture, bucket_size(picture.width, picture.height, side, step))


def bucket_size(width: int, height: int, side: int, step: int) -> tuple[int, int]:
    """Width and height that are multiples of `step`, near a picture's own aspect, and of about side * side pixels.

    A smaller picture keeps about its size.
    """
    scale = min(1.0, side / math.sqrt(width * height))
    return max(1, round(width * scale / step)) * step, max(1, round(height * scale / step)) * step


def pixels(picture: Image) -> Tensor:
    """A picture in RGB as [3, H, W] in -1 .. 1."""
    import numpy as np

    return torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 127.5 - 1
