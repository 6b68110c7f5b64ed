"""Videos, in whatever form a row holds them, into the frames that a model sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .attachments import Attachment, open_attachment
from .errors import DataError
from .pictures import limited_size, load_picture

Frames = npt.NDArray[np.uint8]

DEFAULT_FPS = 2.0
_MAX_PIXELS_OF_ALL = 1 << 29  # 1.6 GB: no model takes as much of one video, and a worker should survive it


@dataclass(frozen=True)
class Video:
    """Frames taken from a video.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB.
        indices: which frames of the whole video these are, counted at `fps`; T, ascending.
        fps: frames a second of the whole video.
        total: frames of the whole video.
    """

    frames: Frames
    indices: list[int]
    fps: float
    total: int

    @property
    def sampled_fps(self) -> float:
        """Frames a second of those taken."""
        return len(self.indices) / self.total * self.fps


def load_video(
    video: Any,
    folder: Path | None = None,
    root: Path | None = None,
    *,
    fps: float = DEFAULT_FPS,
    max_frames: int | None = None,
    max_pixels: int | None = None,
) -> Video:
    """Decode the frames of a video that are nearest to equally spaced times.

    Args:
        video: what `open_attachment` takes (path, bytes, base64, dict of these) in any container and codec that PyAV
            decodes; or frames that have been taken already, at `fps`: a list of pictures (see `load_picture`), or an
            array uint8 [T, H, W, 3].
        folder: what a relative path starts from; None is the working directory.
        root: the folder that a path may not leave; None = anywhere.
        fps: frames a second that are taken, at most all that there are.
        max_frames: a longer video gives as many frames, spread over all of it.
        max_pixels: larger frames are scaled down to about as many pixels, keeping their aspect.

    Raises:
        DataError: "missing file"; "path outside root"; "broken video"; "no frames"; "too many pixels"; for a frame that
            is a picture, what `load_picture` raises.
        ImportError: PyAV is not installed.
    """
    if isinstance(video, np.ndarray) or (isinstance(video, Sequence) and not isinstance(video, (str, bytes))):
        return _from_frames(video, folder, root, fps, max_frames, max_pixels)
    attachment = open_attachment(video, "video", folder, root)
    av = import_av(attachment.label)
    try:
        duration, rate = _duration(av, attachment)
        count, per_second = _sampling(duration, min(fps, rate), max_frames)
        taken = list(_take(av, attachment, count, per_second, 0.5 / rate, max_pixels))
    except DataError:
        raise
    except Exception as error:  # PyAV raises many kinds for a damaged file
        raise DataError(f"{attachment.label} cannot be decoded: {error}", reason="broken video") from error
    if not taken:
        raise DataError(f"{attachment.label} has no frames", reason="no frames")
    indices = [round(time * rate) for time, _ in taken]
    return Video(np.stack([frame for _, frame in taken]), indices, rate, max(round(duration * rate), indices[-1] + 1))


def import_av(label: str) -> Any:
    """The module of PyAV; ImportError that says what to install."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{label} needs PyAV to be decoded: pip install 'veomni-data[video]'") from error
    return av


def _duration(av: Any, attachment: Attachment) -> tuple[float, float]:
    """Seconds and frames a second of a video; the former is measured where the container does not say it."""
    with av.open(attachment.open()) as container:
        if not container.streams.video:
            raise DataError(f"{attachment.label} has no frames: it holds no video stream", reason="no frames")
        stream = container.streams.video[0]
        if stream.width * stream.height > (Image.MAX_IMAGE_PIXELS or 1 << 62):
            raise DataError(
                f"{attachment.label} has frames of {stream.width} x {stream.height} pixels: refused as a "
                f"decompression bomb",
                reason="too many pixels",
            )
        rate = float(stream.average_rate or stream.guessed_rate or 24)
        if stream.duration is not None:
            return float(stream.duration * stream.time_base), rate
        if stream.frames:
            return stream.frames / rate, rate
        if container.duration is not None:
            return container.duration / 1e6, rate  # microseconds
        packets = sum(1 for packet in container.demux(stream) if packet.size)
        return packets / rate, rate


def _sampling(duration: float, fps: float, max_frames: int | None) -> tuple[int, float]:
    """How many frames are taken, and how many a second: `fps` from the start, or `max_frames` spread over the whole.

    They are no list, which would be as long as a damaged header says that the video is.
    """
    # the hair keeps 5.28 s * 25 / s from being 131 frames
    count = max(1, int(duration * fps + 1e-6))
    if max_frames is None or count <= max_frames:
        return count, fps
    return max_frames, max_frames / duration


def _take(
    av: Any, attachment: Attachment, count: int, per_second: float, slack: float, max_pixels: int | None
) -> Iterator[tuple[float, Frames]]:
    """The first frame at or after each of `count` times (less `slack`), with its seconds from the first frame."""
    with av.open(attachment.open()) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        first: float | None = None
        number = held = 0
        for frame in container.decode(stream):
            if number == count:
                return
            time = frame.time if frame.time is not None else 0.0
            first = time if first is None else first
            if time - first < number / per_second - slack:
                continue
            width, height = limited_size(frame.width, frame.height, max_pixels)
            held += width * height
            if held > _MAX_PIXELS_OF_ALL:
                raise DataError(
                    f"{attachment.label} gives more than {_MAX_PIXELS_OF_ALL:,} pixels: set max_frames or max_pixels",
                    reason="too many pixels",
                )
            pixels = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
            yield time - first, np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))
            # a gap in the video may have passed several wanted times
            while number < count and number / per_second - slack <= time - first:
                number += 1


def _from_frames(
    video: Any, folder: Path | None, root: Path | None, fps: float, max_frames: int | None, max_pixels: int | None
) -> Video:
    if isinstance(video, np.ndarray) and video.ndim != 4:
        raise DataError(
            f"a video is an array {list(video.shape)}: it must be uint8 [T, H, W, 3]", reason="broken video"
        )
    if not len(video):
        raise DataError("a video is a list of no frames", reason="no frames")
    total = len(video)
    count = total if max_frames is None else min(total, max_frames)
    indices = [k * total // count for k in range(count)]
    frames = [np.asarray(load_picture(video[i], folder, root, max_pixels=max_pixels)) for i in indices]
    if len({frame.shape for frame in frames}) > 1:
        sizes = ", ".join(sorted({f"{frame.shape[1]} x {frame.shape[0]}" for frame in frames}))
        raise DataError(f"the frames of a video have different sizes: {sizes}", reason="broken video")
    return Video(np.stack(frames), indices, fps, total)
