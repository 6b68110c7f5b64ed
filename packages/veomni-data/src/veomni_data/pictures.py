"""Pictures, in whatever form a row holds them, into RGB."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .attachments import open_attachment
from .errors import DataError


def load_picture(
    picture: Any,
    folder: Path | None = None,
    root: Path | None = None,
    *,
    max_pixels: int | None = None,
    max_pixel_size: int | None = None,
    scale_factor: int | None = None,
) -> Image.Image:
    """Decode a picture fully, upright as its EXIF says, in RGB on white, and scale it down to the limits.

    Args:
        picture: a PIL image; an array uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; or what `open_attachment`
            takes: a path, bytes, base64, or a dict of these (as `datasets` writes them).
        folder: what a relative path starts from; None is the working directory.
        root: the folder that a path may not leave; None = anywhere.
        max_pixels: a larger picture is scaled down to about as many pixels, keeping its aspect.
        max_pixel_size: a picture whose longer side has more pixels is scaled down to it, keeping its aspect.
        scale_factor: each side becomes a multiple of this, at least once and the nearest within the limits, as models
            want it whose patches do not overlap.

    Raises:
        DataError: "missing file"; "path outside root"; "broken picture" (also one that is cut off); "too many pixels",
            where Pillow's limit (`PIL.Image.MAX_IMAGE_PIXELS`) takes it for a decompression bomb. Named in the message.
    """
    limits = (max_pixels, max_pixel_size, scale_factor)
    label = "a picture"
    try:
        if isinstance(picture, Image.Image):
            return _scaled(_upright(picture), *limits)
        if isinstance(picture, np.ndarray):
            return _scaled(_from_array(picture), *limits)
        attachment = open_attachment(picture, "picture", folder, root)
        label = attachment.label
        with Image.open(attachment.open()) as image:
            if max_pixels or max_pixel_size:
                # JPEG alone can be decoded at a half, quarter or eighth of its size, never below what is asked for
                image.draft("RGB", limited_size(*image.size, *limits))
            return _scaled(_upright(image), *limits)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{label} is refused: {error}", reason="too many pixels") from error
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        raise DataError(f"{label} cannot be decoded: {error}", reason="broken picture") from error


def limited_size(
    width: int,
    height: int,
    max_pixels: int | None = None,
    max_pixel_size: int | None = None,
    scale_factor: int | None = None,
) -> tuple[int, int]:
    """Width and height within the limits of `load_picture`, unchanged where they already are."""
    scale = 1.0
    if max_pixels is not None:
        scale = min(scale, math.sqrt(max_pixels / (width * height)))
    if max_pixel_size is not None:
        scale = min(scale, max_pixel_size / max(width, height))
    if scale_factor is None:
        return (width, height) if scale == 1.0 else (max(1, int(width * scale)), max(1, int(height * scale)))
    sides = [max(1, round(side * scale / scale_factor)) * scale_factor for side in (width, height)]
    too_many = max_pixels is not None and sides[0] * sides[1] > max_pixels
    if too_many or (max_pixel_size is not None and max(sides) > max_pixel_size):
        sides = [max(1, math.floor(side * scale / scale_factor)) * scale_factor for side in (width, height)]
    return sides[0], sides[1]


def _scaled(image: Image.Image, *limits: int | None) -> Image.Image:
    size = limited_size(*image.size, *limits)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):  # Pillow would make all but the darkest white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its values have 32 bits, of which the range is not known: store it with 8 or 16")
    if image.has_transparency_data:  # Pillow would show what lies under it, often black
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def _from_array(array: Any) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)):
        raise DataError(
            f"a picture is an array {list(array.shape)} of {array.dtype}: it must be uint8 [H, W], [H, W, 3] or "
            f"[H, W, 4]",
            reason="broken picture",
        )
    return _upright(Image.fromarray(pixels))
