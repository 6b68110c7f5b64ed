"""What a row attaches to its text, in any of the forms that data come in, down to a file or bytes."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DataError
from .files import resolve_path

# base64 of how PNG, JPEG, GIF, RIFF (WebP, WAV, AVI), Ogg, FLAC, MP3, Matroska and MP4 begin
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "T2dnU", "ZkxhQ", "SUQz", "//v", "//s", "GkXfo", "AAAA")
_SHORTEST_BASE64 = 64  # characters: a path can begin like base64, but no file of these kinds is as short as that
_LONGEST_PATH = 4096


@dataclass(frozen=True)
class Attachment:
    """A file or its bytes.

    Attributes:
        label: for messages, such as `picture "img/3.png"` or "a picture".
        content: the path of a file that is there, or the bytes of one.
    """

    label: str
    content: Path | bytes

    def open(self) -> Path | BinaryIO:
        """What decoders take: the path, or a stream of the bytes."""
        return self.content if isinstance(self.content, Path) else io.BytesIO(self.content)


def open_attachment(value: Any, kind: str, folder: Path | None = None, root: Path | None = None) -> Attachment:
    """The file or bytes that a value stands for.

    Args:
        value: a path (`file://` allowed), the bytes of a file, base64 of these (plain or as a `data:` URL), or a
            mapping with "bytes", "path", "url", "base64" or "data" that holds one of these, as `datasets` and chat
            formats write them. "bytes" goes before the rest.
        kind: the word for it in messages: "picture", "video" or "sound".
        folder: what a relative path starts from, see `resolve_path`.
        root: the folder that a path may not leave; None = anywhere.

    Raises:
        DataError: of another type; a web address; base64 that is cut off ("broken <kind>"); "missing file"; "path
            outside root".
    """
    name = None
    if isinstance(value, Mapping):
        name = value.get("path")
        keys = ("bytes", "path", "url", "base64", "data")
        value = next((value[key] for key in keys if value.get(key) is not None), None)
        if isinstance(value, Mapping):
            return open_attachment(value, kind, folder, root)
        if value is None:
            raise DataError(f"a {kind} has neither of {', '.join(keys)}", reason=f"broken {kind}")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Attachment(f'{kind} "{name}"' if name else f"a {kind}", bytes(value))
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(
            f"a {kind} is a {type(value).__name__}: it must be a path, bytes or base64", reason=f"broken {kind}"
        )
    if value[:7].lower() in ("http://", "https:/"):
        raise DataError(
            f'{kind} "{value[:200]}" is a web address, and nothing is fetched while training: download it first',
            reason="missing file",
        )
    if value.startswith("data:"):
        return Attachment(f"a {kind}", _decoded(value.partition(",")[2], kind))
    looks_like_base64 = len(value) >= _SHORTEST_BASE64 and value.startswith(_BASE64_STARTS)
    # a path that only looks like base64 is told by being there
    if len(value) > _LONGEST_PATH or (looks_like_base64 and not Path(folder or "", value).is_file()):
        return Attachment(f"a {kind}", _decoded(value, kind))
    label = f'{kind} "{value}"'
    try:
        return Attachment(label, resolve_path(value.removeprefix("file://"), folder, root))
    except DataError as error:
        if error.reason != "missing file":
            raise DataError(f"{label} may not be read: {error}", reason=error.reason) from error
        path = Path(folder or root or "", value)
        raise DataError(f"{label} does not exist ({path})", reason=error.reason) from error


def _decoded(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"a {kind} is not whole base64: {error}", reason=f"broken {kind}") from error
