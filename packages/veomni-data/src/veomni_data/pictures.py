"""Pictures, in whatever form a row holds them, into RGB."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from .errors import DataError


def load_picture(picture: Any, folder: Path | None = None) -> Image.Image:
    """Decode a picture fully, upright as its EXIF says, in RGB.

    Args:
        picture: a path, the bytes of a file, a dict with "bytes" or "path" (as `datasets` writes them), or a PIL image.
        folder: what a relative path starts from; None is the working directory.

    Raises:
        DataError: missing, broken, cut off, or of so many pixels that Pillow refuses it; the message names the picture.
    """
    if isinstance(picture, Mapping):
        name, data = picture.get("path"), picture.get("bytes")
        picture = name if data is None else data
    else:
        name = picture if isinstance(picture, (str, Path)) else None
    label = f'picture "{name}"' if name else "a picture"
    try:
        if isinstance(picture, (str, Path)):
            picture = (folder or Path()) / picture
        elif isinstance(picture, (bytes, bytearray)):
            picture = io.BytesIO(picture)
        elif isinstance(picture, Image.Image):
            return _upright(picture)
        else:
            raise DataError(f"{label} is a {type(picture).__name__}: it must be a path, bytes or an image")
        with Image.open(picture) as image:
            return _upright(image)
    except FileNotFoundError as error:
        raise DataError(f"{label} does not exist ({picture})") from error
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file, and one for far too many pixels
        raise DataError(f"{label} cannot be decoded: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return ImageOps.exif_transpose(image).convert("RGB")
