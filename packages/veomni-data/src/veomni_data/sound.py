"""Sounds, in whatever form a row holds them, into one channel at a model's sampling rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .attachments import Attachment, open_attachment
from .errors import DataError
from .video import import_av

Wave = npt.NDArray[np.float32]

_BLOCK = 1 << 20  # frames read at a time
_LOWEST_RATE = 100  # samples a second; a false one that is lower would, resampled, become a huge wave


def load_sound(
    sound: Any,
    folder: Path | None = None,
    root: Path | None = None,
    *,
    sampling_rate: int,
    max_seconds: float | None = None,
) -> Wave:
    """Decode a sound, mixed down to one channel.

    Args:
        sound: what `open_attachment` takes (path, bytes, base64, dict of these): WAV, FLAC, Ogg, MP3, or any container
            that PyAV decodes, such as the sound of an MP4; or decoded, as `datasets` gives it, with "array" ([N],
            [channels, N] or [N, channels]) and "sampling_rate".
        folder: what a relative path starts from; None is the working directory.
        root: the folder that a path may not leave; None = anywhere.
        sampling_rate: samples a second of what is returned; others are resampled (soxr).
        max_seconds: the rest of a longer sound is cut off.

    Returns:
        float32 [N], from -1 to 1.

    Raises:
        DataError: "missing file"; "path outside root"; "broken sound" where it cannot be decoded, is empty, or holds
            values that are not finite.
        ImportError: soundfile, PyAV or soxr is needed and not installed.
    """
    decoded = _decoded(sound)
    if decoded is None:
        attachment = open_attachment(sound, "sound", folder, root)
        label = attachment.label
        wave, rate = _read(attachment, max_seconds)
    else:
        label = "a sound"
        wave, rate = decoded
    if rate < _LOWEST_RATE:
        raise DataError(f"{label} has a sampling rate of {rate}", reason="broken sound")
    if max_seconds is not None:
        wave = wave[: round(max_seconds * rate)]
    if not len(wave):
        raise DataError(f"{label} is empty: it has no sample", reason="broken sound")
    if not np.isfinite(wave).all():
        bad = int(np.flatnonzero(~np.isfinite(wave))[0])
        raise DataError(f"{label} is {wave[bad]} at {bad / rate:.3f} s", reason="broken sound")
    return _resampled(wave, rate, sampling_rate)


def _decoded(sound: Any) -> tuple[Wave, int] | None:
    """The wave and rate of a sound that is decoded already; None if it is not."""
    if isinstance(sound, np.ndarray):
        raise DataError(
            'a sound is an array, of which the rate is not known: give {"array": ..., "sampling_rate": ...}',
            reason="broken sound",
        )
    # the decoder that `datasets` gives is asked by the same keys, but is no mapping
    decoder = callable(getattr(sound, "get_all_samples", None))
    if not decoder and not (isinstance(sound, Mapping) and sound.get("array") is not None):
        return None
    try:
        array, rate = np.asarray(sound["array"]), int(sound["sampling_rate"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f'a decoded sound cannot be read: it needs "array" and "sampling_rate" ({error})', reason="broken sound"
        ) from error
    if array.dtype.kind == "i":
        array = array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    if array.dtype.kind != "f" or array.ndim not in (1, 2):
        raise DataError(
            f"a decoded sound is an array {list(array.shape)} of {array.dtype}: it must be [N] or [channels, N] of "
            f"floats or signed integers",
            reason="broken sound",
        )
    if array.ndim == 2:
        array = array.mean(axis=int(np.argmin(array.shape)))  # fewer channels than samples
    return array.astype(np.float32), rate


def _read(attachment: Attachment, max_seconds: float | None) -> tuple[Wave, int]:
    try:
        import soundfile  # type: ignore[import-untyped]
    except ImportError:
        return _read_with_av(attachment, max_seconds, None)
    try:
        with soundfile.SoundFile(attachment.open()) as file:
            rate: int = file.samplerate
            wanted = file.frames if max_seconds is None else min(file.frames, round(max_seconds * rate))
            # in blocks: as much memory as there is sound, not as a damaged header says
            pieces, left = [np.zeros(0, np.float32)], wanted
            while left > 0 and len(piece := file.read(min(left, _BLOCK), dtype="float32", always_2d=True)):
                pieces.append(piece.mean(axis=1))
                left -= len(piece)
            wave = np.concatenate(pieces)
            if left > 0:
                raise DataError(f"{attachment.label} ends after {len(wave) / rate:.3f} s", reason="broken sound")
            return wave, rate
    except DataError:
        raise
    except Exception as error:  # a container of another kind, or damaged
        return _read_with_av(attachment, max_seconds, error)


def _read_with_av(attachment: Attachment, max_seconds: float | None, why: Exception | None) -> tuple[Wave, int]:
    try:
        av = import_av(attachment.label)
    except ImportError as error:
        if why is None:
            raise ImportError(
                f"{attachment.label} needs soundfile to be decoded: pip install 'veomni-data[audio]'"
            ) from error
        raise DataError(
            f"{attachment.label} cannot be decoded: {why} (containers such as MP4 need pip install "
            f"'veomni-data[video]')",
            reason="broken sound",
        ) from error
    blocks: list[Wave] = []
    try:
        with av.open(attachment.open()) as container:
            if not container.streams.audio:
                raise DataError(f"{attachment.label} holds no sound", reason="broken sound")
            stream = container.streams.audio[0]
            rate = int(stream.rate)
            mono = av.AudioResampler(format="flt", layout="mono")
            most = float("inf") if max_seconds is None else max_seconds * rate
            for frame in container.decode(stream):
                blocks += [block.to_ndarray()[0] for block in mono.resample(frame)]
                if sum(map(len, blocks)) >= most:
                    break
    except DataError:
        raise
    except Exception as error:  # PyAV raises many kinds for a damaged file
        raise DataError(f"{attachment.label} cannot be decoded: {error}", reason="broken sound") from error
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate


def _resampled(wave: Wave, rate: int, wanted: int) -> Wave:
    wave = np.ascontiguousarray(wave, dtype=np.float32)
    if rate == wanted:
        return wave
    try:
        import soxr  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"a sound of {rate} samples a second needs soxr to become {wanted}: pip install 'veomni-data[audio]'"
        ) from error
    resampled: Wave = soxr.resample(wave, rate, wanted)
    return resampled
