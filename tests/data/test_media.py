from __future__ import annotations

import base64
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from veomni_data import Row
from veomni_data.media import media_of, row_as_text


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def tone(seconds: float = 0.1) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((np.sin(np.arange(int(8000 * seconds))) * 9000).astype("<i2").tobytes())
    return buffer.getvalue()


def video(path: Path, container: str, codec: str) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), i * 30, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def content(url: str | None) -> bytes:
    assert url is not None
    return base64.b64decode(url.partition(",")[2])


def test_columns_and_parts_of_messages_are_found_in_any_layout(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 8))
    (tmp_path / "b.wav").write_bytes(tone())
    values: dict[str, Any] = {
        "conversations": [
            {"from": "human", "value": [{"type": "audio_url", "audio_url": {"url": "b.wav"}}]},
            {"from": "gpt", "value": "yes"},
        ],
        "images": ["a.png", png(300, 200)],
    }
    media = media_of(Row(values, "x.jsonl:1", tmp_path))
    assert [(m.kind, m.problem) for m in media] == [("image", None), ("image", None), ("audio", None)]
    assert media[0].label == "a.png (8 x 8)"
    assert [m.small for m in media] == [True, False, False]
    assert content(media[2].url) == tone()
    assert str(media[2].url).startswith("data:audio/wav;")


def test_columns_of_other_names_are_shown() -> None:
    row = {"prompt": "<image>?", "completion": "red", "photo": png(8, 8)}
    assert [m.kind for m in media_of(row, None, {"image": "photo"})] == ["image"]
    assert [m.kind for m in media_of(row, {"images": "photo"})] == ["image"]


def test_decoded_sound_becomes_a_wave_file() -> None:
    sound = {"array": np.sin(np.arange(16000)).astype(np.float32) * 0.5, "sampling_rate": 16000}
    (medium,) = media_of({"audio": sound})
    with wave.open(io.BytesIO(content(medium.url))) as file:
        assert (file.getframerate(), file.getnframes()) == (16000, 16000)
        samples = np.frombuffer(file.readframes(16000), "<i2") / 32767
    assert np.abs(samples - sound["array"]).max() < 1e-4


def test_a_video_that_browsers_play_is_embedded_and_another_gives_frames(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", "mp4", "mpeg4")
    video(tmp_path / "b.avi", "avi", "mpeg4")
    played, *frames = media_of(Row({"videos": ["a.mp4", "b.avi"]}, "x:1", tmp_path))
    assert content(played.url) == (tmp_path / "a.mp4").read_bytes()
    assert str(played.url).startswith("data:video/mp4;")
    assert {(m.kind, m.problem) for m in frames} == {("image", None)}
    assert 1 < len(frames) <= 6


def test_what_cannot_be_shown_says_why(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png(8, 8))
    values = {"images": [b"nonsense", "none.png", "../secret.png"], "audio": {"array": [], "sampling_rate": 8000}}
    media = media_of(Row(values, "x:1", root, None, root))
    assert all(m.url is None for m in media)
    problems = [str(m.problem) for m in media]
    for problem, reason in zip(problems, ("cannot be decoded", "does not exist", "leads out of", "empty"), strict=True):
        assert reason in problem


def test_a_large_picture_is_made_smaller() -> None:
    (medium,) = media_of({"image": png(3000, 1500)})
    with Image.open(io.BytesIO(content(medium.url))) as shown:
        assert shown.size == (768, 384)
    assert medium.label == "picture (3000 x 1500)"


def test_a_row_as_text_holds_no_bytes() -> None:
    assert row_as_text({"image": b"1234", "text": "Zoë"}) == '{\n  "image": "<4 bytes>",\n  "text": "Zoë"\n}'
