"""The pictures, videos and sounds that a row names, as a browser can show them."""

from __future__ import annotations

import base64
import io
import json
import mimetypes
import wave
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .attachments import open_attachment
from .errors import DataError
from .layouts import normalize_example
from .pictures import load_picture
from .placeholders import KINDS
from .sound import load_sound
from .video import load_video

_WORDS = {"image": "picture", "video": "video", "audio": "sound"}
_MAGIC = (
    (0, b"\x89PNG", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (8, b"WAVE", "audio/wav"),
    (8, b"AVI ", "video/x-msvideo"),
    (0, b"OggS", "audio/ogg"),
    (0, b"fLaC", "audio/flac"),
    (0, b"ID3", "audio/mpeg"),
    (0, b"\xff\xfb", "audio/mpeg"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1a\x45\xdf\xa3", "video/webm"),
)
_PLAYED = ("video/mp4", "video/webm", "video/ogg")
_STILLS = 6  # of a video that browsers do not play
_MOST_BYTES = 32 << 20  # of one video or sound
_MOST_PIXELS = 768  # of the longer side of a picture
_SMALL = 96  # pixels: such a picture is shown larger


@dataclass(frozen=True)
class Medium:
    """A picture, video or sound.

    Attributes:
        kind: "image", "video" or "audio".
        label: its file, or what it is.
        url: a `data:` URL of its content; None if there is a problem.
        problem: why it cannot be shown.
        small: whether it is a picture of few pixels, which is to be shown larger, pixel by pixel.
    """

    kind: str
    label: str
    url: str | None
    problem: str | None = None
    small: bool = False


def media_of(
    row: Mapping[str, Any], columns: Mapping[str, str] | None = None, keys: Mapping[str, str] | None = None
) -> list[Medium]:
    """What a row shows and plays: that of its columns, and that within its messages.

    Args:
        row: of a dataset; `folder` and `root` say where paths in it start from and what they may not leave.
        columns: as for `normalize_example`.
        keys: kind to column, where its name is another than usual.
    """
    folder, root = getattr(row, "folder", None), getattr(row, "root", None)
    values = list(_find(row, columns, keys or {}))
    return [medium for kind, value in values for medium in _media(kind, value, folder, root)]


def row_as_text(row: Mapping[str, Any]) -> str:
    """A row as indented JSON, with what is no text shortened."""
    return json.dumps(_plain(row), indent=2, ensure_ascii=False)


def _find(
    row: Mapping[str, Any], columns: Mapping[str, str] | None, keys: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """The kind and value of all that is attached."""
    normal: Mapping[str, Any] = row
    with suppress(DataError):  # of no layout: there may be columns of media all the same
        normal = normalize_example(row, columns)
    for kind in KINDS:
        held = next(
            (normal[key] for key in (keys.get(kind, kind), f"{kind}s", kind) if normal.get(key) is not None), None
        )
        several = list(held) if isinstance(held, Sequence) and not isinstance(held, (str, bytes)) else [held]
        yield from ((kind, value) for value in several if value is not None)
    for key in ("messages", "chosen", "rejected"):
        turns = normal.get(key)
        for message in turns if isinstance(turns, list) else ():
            content = message.get("content") if isinstance(message, Mapping) else None
            for part in content if isinstance(content, list) else ():
                if part.get("value") is not None:
                    yield part["type"], part["value"]


def _media(kind: str, value: Any, folder: Path | None, root: Path | None) -> list[Medium]:
    """A picture, video or sound; a video that browsers do not play gives some of its frames."""
    label = value if isinstance(value, str) and len(value) < 300 else _WORDS[kind]
    try:
        if kind == "image":
            return [_picture(label, value, folder, root)]
        if isinstance(value, Mapping) and value.get("array") is not None:
            rate = int(value["sampling_rate"])
            wave = load_sound(value, sampling_rate=rate)
            return [Medium(kind, f"sound of {len(wave) / rate:.1f} s", _url("audio/wav", _wav(wave, rate)))]
        if kind == "video" and not isinstance(value, (str, bytes, Path, Mapping)):
            return _stills(label, value, folder, root)
        attachment = open_attachment(value, _WORDS[kind], folder, root)
        content = attachment.content
        data = content.read_bytes() if isinstance(content, Path) else content
        mime = _mime(kind, label, data)
        if kind == "video" and mime not in _PLAYED:
            return _stills(label, value, folder, root)
        if len(data) > _MOST_BYTES:
            return [Medium(kind, label, None, f"{len(data) / 2**20:,.0f} MB: too large for a page")]
        return [Medium(kind, label, _url(mime, data))]
    except (DataError, ImportError, OSError) as error:
        return [Medium(kind, label, None, str(error) or type(error).__name__)]


def _stills(label: str, value: Any, folder: Path | None, root: Path | None) -> list[Medium]:
    video = load_video(value, folder, root, max_frames=_STILLS, max_pixels=_MOST_PIXELS**2)
    return [
        _picture(f"{label}, frame {index}", Image.fromarray(frame), None, None)
        for index, frame in zip(video.indices[:_STILLS], video.frames, strict=False)
    ]


def _picture(label: str, value: Any, folder: Path | None, root: Path | None) -> Medium:
    image = load_picture(value, folder, root)
    name = f"{label} ({image.width} x {image.height})"
    small = max(image.size) <= _SMALL
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    buffer = io.BytesIO()
    # a photograph is small as JPEG; what has few pixels is to be seen as it is
    image.save(buffer, "PNG" if small else "JPEG", quality=88)
    return Medium("image", name, _url("image/png" if small else "image/jpeg", buffer.getvalue()), small=small)


def _wav(samples: Any, rate: int) -> bytes:
    """Sound, float [N] of -1 .. 1, as a WAV file of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def _mime(kind: str, label: str, data: bytes) -> str:
    found = _sniff(data) or mimetypes.guess_type(label)[0] or f"{kind}/*"
    # a container says little of what it holds: what the row calls sound is played as sound
    return f"{kind}/{found.partition('/')[2]}"


def _sniff(data: bytes) -> str | None:
    return next((mime for at, magic, mime in _MAGIC if data[at : at + len(magic)] == magic), None)


def _url(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    if isinstance(value, str) and len(value) > 20_000:
        return f"{value[:2000]} ... ({len(value):,} characters)"
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value):,} bytes>"
    shape = getattr(value, "shape", None)
    return f"<{type(value).__name__}{'' if shape is None else f' {list(shape)}'}>"
