"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from veomni_recipes.evaluation import Answer


def draw_loss(
    metrics: Sequence[dict[str, Any]],
    path: Path,
    validations: Sequence[dict[str, Any]] = (),
    *,
    unit: str = "nats a target token",
) -> None:
    """Loss in a unit and learning rate over steps, from the lines of metrics.jsonl and, as points, validation.jsonl."""
    from matplotlib.figure import Figure

    steps = [line["step"] for line in metrics]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogy(steps, [line["loss"] for line in metrics], color="tab:blue")
    if validations:
        axes.semilogy([v["step"] for v in validations], [v["loss"] for v in validations], "o-k", label="held-out data")
        axes.legend()
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})", color="tab:blue")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [line["lr"] for line in metrics], color="tab:orange", alpha=0.7)
    rate.set_ylabel("learning rate", color="tab:orange")
    figure.savefig(path, dpi=120)


def draw_answers(
    answers: Sequence[Answer],
    prompts: Sequence[Mapping[str, Any]],
    path: Path,
    scores: Mapping[str, float],
    columns: int = 6,
    rows: int = 6,
) -> None:
    """A grid of held-out pictures, frames of videos and spectra of sounds with question, answer and what was drawn.

    Some of every task are shown; errors are red, with the truth.

    Args:
        answers: of the model.
        prompts: the held-out samples; `images`, `videos` and `audio` of `prompts[answer.row]` are what it is about.
        path: the PNG file, in the folder of the run.
        scores: shares of right answers, for the title.
        columns, rows: size of the grid.
    """
    from matplotlib.figure import Figure

    chosen = _choose(answers, columns * rows)
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.2 * rows + 0.6), layout="constrained")
    figure.suptitle(", ".join(f"{k.removesuffix('_accuracy').replace('_', ' ')} {v:.1%}" for k, v in scores.items()))
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, answer in zip(places, chosen, strict=False):
        drawn = [_open(path.parent / name) for name in answer.drawings]
        pictures = [*_pictures(prompts[answer.row]), *drawn]
        if pictures:
            axes.imshow(_side_by_side(pictures), interpolation="nearest")
        truth = "" if answer.right else f"\ntruth: {answer.truth}"
        color = "black" if answer.right else "red"
        axes.set_title(f"{answer.question}\n{answer.text}{truth}", fontsize=8, color=color)
    for axes in places:
        axes.axis("off")
    figure.savefig(path, dpi=120)


def draw_pairs(originals: Tensor, made: Tensor, path: Path, columns: int = 16, rows: int = 4) -> None:
    """A grid of pictures, each with what became of it below.

    Args:
        originals, made: [n, 3, S, S] in -1 .. 1.
    """
    from PIL import Image

    side, scale = originals.shape[-1], max(1, 64 // originals.shape[-1])
    sheet = Image.new("RGB", (columns * (side + 1), rows * (2 * side + 3)), "grey")
    for i in range(min(len(originals), columns * rows)):
        for below, picture in enumerate((originals[i], made[i])):
            pixels = ((picture.movedim(0, -1) + 1) * 127.5).round().byte().numpy()
            top = i // columns * (2 * side + 3) + below * (side + 1)
            sheet.paste(Image.fromarray(pixels), (i % columns * (side + 1), top))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def _open(path: Path) -> Image:
    from PIL import Image

    return Image.open(path)


def _choose(answers: Sequence[Answer], count: int) -> list[Answer]:
    """The same number of every task, each task's errors first but on no more than a third of its places."""
    tasks = list(dict.fromkeys(answer.task for answer in answers))
    chosen: list[Answer] = []
    for i, task in enumerate(tasks):
        places = (count - len(chosen)) // (len(tasks) - i)
        own = [a for a in answers if a.task == task]
        wrong = [a for a in own if not a.right][: places // 3]
        chosen += wrong + [a for a in own if a.right][: places - len(wrong)]
    return chosen


def _pictures(prompt: Mapping[str, Any], stills: int = 4) -> list[Image]:
    """What a prompt is about, as pictures: of a video some frames, of a sound its spectrum over time."""
    from PIL import Image

    frames = [frame for video in prompt.get("videos", ()) for frame in video[:: -(-len(video) // stills)]]
    return [*prompt["images"], *map(Image.fromarray, frames), *map(_spectrum, prompt.get("audio", ()))]


def _spectrum(sound: Any) -> Image:
    """Decibels of a sound [N] over time (to the right) and frequency (upwards), 60 dB from black to white."""
    import numpy as np
    from PIL import Image

    padded = np.pad(sound, (0, max(0, 512 - len(sound))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 512)[::64] * np.hanning(512)
    decibels = 20 * np.log10(np.abs(np.fft.rfft(windows)).T[::-1] + 1e-6)
    grey = Image.fromarray((np.clip(decibels - decibels.max() + 60, 0, 60) * (255 / 60)).astype(np.uint8))
    return grey.resize((2 * grey.width, 128))


def _side_by_side(images: Sequence[Image]) -> Any:
    import numpy as np

    height = max(image.height for image in images)
    arrays = [
        np.asarray(image.convert("RGB").resize((round(image.width * height / image.height), height), 0))
        for image in images
    ]
    gap = np.full((height, max(1, height // 8), 3), 255, np.uint8)
    joined = [part for array in arrays for part in (array, gap)]
    return np.concatenate(joined[:-1], axis=1)
