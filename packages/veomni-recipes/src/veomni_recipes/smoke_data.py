"""Small real data that every machine has, for `--smoke`: Python's documentation, and scikit-learn's digits."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def texts() -> list[str]:
    """Python's own documentation of its language: half a megabyte in pieces."""
    from pydoc_data.topics import topics

    return [part for text in topics.values() for part in text.split("\n\n\n")]


def write_texts(path: Path, key: str | None) -> None:
    """One text a line, in the column `key`."""
    write_lines(path, ({key or "text": text} for text in texts()))


def write_conversations(path: Path, key: str | None) -> None:
    """A question about the documentation and a paragraph of it, in the column `key`."""
    from pydoc_data.topics import topics

    write_lines(
        path,
        (
            {key or "messages": _turns(f"What does the documentation say about {name}?", part[:500] or name)}
            for name, text in topics.items()
            for part in text.split("\n\n")[:12]
        ),
    )


def write_preferences(path: Path, key: str | None) -> None:
    """A beginning of a paragraph of the documentation: it goes on as it does, or with its words the other way round."""
    lines = []
    for text in texts():
        if len(words := text.split()[:60]) >= 8:
            half = len(words) // 2
            answers = {"chosen": " ".join(words[half:]), "rejected": " ".join(reversed(words[half:]))}
            lines.append({"prompt": " ".join(words[:half]), **answers})
    write_lines(path, lines)


def write_media(path: Path, key: str | None, kinds: Collection[str], *, draw: bool = False, count: int = 200) -> None:
    """Questions about digits, with a picture and what else is read; with `draw`, each second asks for a picture.

    Args:
        path: of the lines; the files are written beside it.
        key: the column of the conversation.
        kinds: "image", "video" and "audio", as far as they are read. A video moves a digit to the right; a sound is
            a tone whose pitch rises with the digit.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, folder = load_digits(), path.parent / "media"
    folder.mkdir(exist_ok=True)
    lines = []
    for number, (pixels, digit) in enumerate(zip(digits.images[:count], digits.target, strict=False)):
        picture = Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).resize((32, 32)).convert("RGB")
        files: dict[str, list[str]] = {}
        if "image" in kinds or draw:
            picture.save(folder / f"{number}.png")
            files["images"] = [f"media/{number}.png"]
        if draw and (number % 2 or "image" not in kinds):
            turns = _turns(f"Draw a {NAMES[digit]}.", f"{NAMES[digit]}: <image>")
            lines.append({key or "messages": turns, **files})
            continue
        if "video" in kinds:
            _write_video(folder / f"{number}.mp4", picture)
            files["videos"] = [f"media/{number}.mp4"]
        if "audio" in kinds:
            _write_sound(folder / f"{number}.wav", 200.0 * 1.2 ** int(digit))
            files["audios"] = [f"media/{number}.wav"]
        shown = "".join(f"<{name[:-1]}>" for name in files)
        lines.append({key or "messages": _turns(f"{shown}Which digit is this?", NAMES[digit]), **files})
    write_lines(path, lines)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _write_video(path: Path, picture: Any, frames: int = 8) -> None:
    import av
    from PIL import Image

    with av.open(path, "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for step in range(frames):
            canvas = Image.new("RGB", (64, 32))
            canvas.paste(picture, (step * 32 // frames, 0))
            file.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        file.mux(stream.encode(None))


def _write_sound(path: Path, hertz: float, rate: int = 16_000, seconds: float = 0.5) -> None:
    import wave

    import numpy as np

    tone = np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((tone * 2**14).astype("<i2").tobytes())
