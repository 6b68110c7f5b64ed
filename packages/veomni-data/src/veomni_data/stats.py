"""Figures of data: lengths, sources, modalities, how well they fill rows, and what is broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .collators import IGNORED_LABEL, Sample
from .errors import DataError
from .packing import PackingBuffer, pack
from .pipeline import Pipeline, run_workers

ROW_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_ROWS_TO_JUDGE = 8  # with fewer, how full rows are says little
_LOT = 64  # rows that a worker encodes before it sends their figures

Array = npt.NDArray[np.int64]


class Figures(NamedTuple):
    """Of one sample."""

    tokens: int
    targets: int
    source: str
    modalities: tuple[str, ...]  # beside text


class Skipped(NamedTuple):
    """A row that is broken."""

    reason: str
    message: str


class Filling(NamedTuple):
    """How samples fill rows of one length; samples that are longer are left out, or cut if they are plain text.

    Fullness is tokens / (rows * row length).
    """

    row_length: int
    rows: int  # of the whole list packed at once
    whole: float  # fullness of these
    stream: float  # fullness of the rows of a stream with a look-ahead buffer, as the loader makes them
    padded: float  # fullness if each sample were a row of its own
    too_long: int  # samples
    too_long_tokens: int


@dataclass
class Stats:
    """What `collect_stats` found.

    Attributes:
        lengths, targets: int64 [samples], tokens of each sample and how many of them are learnt.
        sources: name to (samples, tokens, targets).
        modalities: "text", "image", "image + audio", ... to (samples, tokens).
        fillings: for each row length that was asked for.
        skipped: reason to (rows, the first message).
        rows: input rows that were read, broken ones too.
    """

    rows: int
    lengths: Array
    targets: Array
    sources: dict[str, tuple[int, int, int]]
    modalities: dict[str, tuple[int, int]]
    fillings: list[Filling] = field(default_factory=list)
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, with percentiles in place of all lengths."""
        total = int(self.lengths.sum())
        return {
            "rows": self.rows,
            "samples": len(self.lengths),
            "tokens": total,
            "targets": int(self.targets.sum()),
            "length_percentiles": _percentiles(self.lengths),
            "target_percentiles": _percentiles(self.targets),
            "sources": {
                name: {"samples": n, "tokens": tokens, "token_share": tokens / max(total, 1), "targets": targets}
                for name, (n, tokens, targets) in self.sources.items()
            },
            "modalities": {name: {"samples": n, "tokens": tokens} for name, (n, tokens) in self.modalities.items()},
            "packing": [filling._asdict() for filling in self.fillings],
            "skipped": {reason: {"rows": n, "first": first} for reason, (n, first) in self.skipped.items()},
        }


def collect_stats(
    pipeline: Pipeline,
    *,
    row_lengths: Sequence[int] | None = None,
    buffer_size: int = 200,
    limit: int | None = None,
    workers: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> Stats:
    """Encode the rows of a pipeline and count.

    Args:
        row_lengths: for which it is worked out how well samples fill rows; None is those of `ROW_LENGTHS` of which the
            data fill some.
        buffer_size: of the stream that is packed for this.
        limit: the most rows that are read: evenly spread over all where their number is known, else the first.
        workers: processes that encode; data of `kind` "iterable" are read by this one alone.
        progress: called with the number of rows that are done, and of all if it is known.

    Raises:
        DataError: there is no sample that is not broken.
    """
    figures: list[Figures] = []
    skipped: list[Skipped] = []
    done, total = 0, _rows_to_read(pipeline, limit)
    for found in _encode_all(pipeline, limit, workers):
        done += 1
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            figures += found
        if progress is not None:
            progress(done, total)
    if not figures:
        first = f"; the first: {skipped[0].message}" if skipped else ""
        raise DataError(f"none of the {done} rows gives a sample{first}")
    lengths = np.array([f.tokens for f in figures], np.int64)
    if row_lengths is None:
        row_lengths = [n for n in ROW_LENGTHS if n * _ROWS_TO_JUDGE <= lengths.sum()] or ROW_LENGTHS[:1]
    cut = pipeline.description.type == "plaintext"
    return Stats(
        rows=done,
        lengths=lengths,
        targets=np.array([f.targets for f in figures], np.int64),
        sources=_by_source(figures),
        modalities=_by_modality(figures),
        fillings=[fill(lengths, length, buffer_size, cut=cut) for length in row_lengths],
        skipped=_by_reason(skipped),
    )


def fill(lengths: Array, row_length: int, buffer_size: int, *, cut: bool) -> Filling:
    """How samples of these lengths fill rows.

    Args:
        cut: whether samples that are longer than a row are cut into pieces; else they are left out.
    """
    long = lengths > row_length
    fitting = lengths[~long].tolist()
    if cut:
        fitting += [piece for length in lengths[long].tolist() for piece in _pieces(length, row_length)]
    tokens = sum(fitting)
    rows = pack(fitting, row_length)
    buffer: PackingBuffer[int] = PackingBuffer(row_length, buffer_size, length=_same)
    streamed = sum(buffer.put(length) is not None for length in fitting) + len(buffer.flush())
    return Filling(
        row_length,
        len(rows),
        whole=tokens / max(len(rows) * row_length, 1),
        stream=tokens / max(streamed * row_length, 1),
        padded=tokens / max(len(fitting) * row_length, 1),
        too_long=int(long.sum()),
        too_long_tokens=int(lengths[long].sum()),
    )


def modalities_of(sample: Sample) -> tuple[str, ...]:
    """What a sample has beside text, by the tensors that processors make of pictures, video and sound."""
    found = set()
    for key in sample:
        if "video" in key:
            found.add("video")
        elif key.startswith(("pixel_", "image_")):
            found.add("image")
        elif key.startswith(("input_features", "feature_", "audio_", "input_values")):
            found.add("audio")
    return tuple(sorted(found))


def _encode_all(pipeline: Pipeline, limit: int | None, workers: int) -> Iterator[list[Figures] | Skipped]:
    if pipeline.description.kind == "iterable":
        for row in islice(pipeline.read(), limit):
            yield _figures(pipeline, row)
        return
    count = len(pipeline.rows)
    take = min(limit or count, count)
    numbers = np.arange(take) * count // take
    lots = [numbers[at : at + _LOT].tolist() for at in range(0, take, _LOT)]
    for lot in run_workers(_Lots(pipeline), workers, lots):
        yield from lot


class _Lots:
    """The figures of lots of rows, by their numbers."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def __getitem__(self, numbers: list[int]) -> list[list[Figures] | Skipped]:
        return [_figures(self._pipeline, number) for number in numbers]


def _figures(pipeline: Pipeline, row: Any) -> list[Figures] | Skipped:
    try:
        if isinstance(row, int):
            row = pipeline.rows[row]
        elif isinstance(row, DataError):
            raise row
        samples = pipeline.encode(row)
    except DataError as error:
        return Skipped(error.reason, str(error))
    source = getattr(row, "source", None) or ""
    apart = pipeline.description.type == "prepared"
    return [figures for sample in samples for figures in _of_sample(sample, source, apart)]


def _of_sample(sample: Sample, source: str, apart: bool) -> Iterator[Figures]:
    """The figures of a sample; if `apart` of each of those that it is made of."""
    modalities = modalities_of(sample)
    at = 0
    for length in sample["seq_lens"] if apart else [len(sample["input_ids"])]:
        labels = sample["labels"][at + 1 : at + length]
        yield Figures(length, int((labels != IGNORED_LABEL).sum()), source, modalities)
        at += length


def _rows_to_read(pipeline: Pipeline, limit: int | None) -> int | None:
    if pipeline.description.kind == "iterable":
        return limit
    return min(limit or len(pipeline.rows), len(pipeline.rows))


def _by_source(figures: list[Figures]) -> dict[str, tuple[int, int, int]]:
    sums: dict[str, tuple[int, int, int]] = {}
    for f in figures:
        n, tokens, targets = sums.get(f.source, (0, 0, 0))
        sums[f.source] = (n + 1, tokens + f.tokens, targets + f.targets)
    return dict(sorted(sums.items()))


def _by_modality(figures: list[Figures]) -> dict[str, tuple[int, int]]:
    sums: dict[str, tuple[int, int]] = {}
    for f in figures:
        name = " + ".join(f.modalities) or "text"
        n, tokens = sums.get(name, (0, 0))
        sums[name] = (n + 1, tokens + f.tokens)
    return dict(sorted(sums.items()))


def _by_reason(skipped: list[Skipped]) -> dict[str, tuple[int, str]]:
    counts = Counter(entry.reason for entry in skipped)
    firsts = {entry.reason: entry.message for entry in reversed(skipped)}
    return {reason: (count, firsts[reason]) for reason, count in counts.most_common()}


def _percentiles(values: Array) -> dict[str, float]:
    shown = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {**shown, "mean": float(values.mean())}


def _pieces(length: int, most: int) -> list[int]:
    return [most] * (length // most) + ([length % most] if length % most else [])


def _same(value: Any) -> Any:
    return value
