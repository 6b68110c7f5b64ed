"""Samples and packed rows of data, ready to be shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .collators import Batch, Sample
from .errors import DataError
from .html_page import ShownRow, ShownSample, tensor_shapes
from .media import Medium, media_of, row_as_text
from .packing import PackingBuffer
from .pipeline import Pipeline
from .placeholders import KINDS
from .prepared import read_places
from .stats import modalities_of
from .token_view import view_batch, view_sample

_SHORTEST_ROW = 1024
_PACKED_ROWS = 4
_LOOK_AHEAD = 64  # rows that are read for the packed rows, at most
_TOKEN_TENSORS = ("input_ids", "labels", "seq_lens")


@dataclass
class Inspection:
    """What `inspect_data` found.

    Attributes:
        samples: of the rows that were asked for.
        rows: how samples pack; of prepared data, their rows.
        broken: rows that gave no sample, and why.
    """

    samples: list[ShownSample] = field(default_factory=list)
    rows: list[ShownRow] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def inspect_data(
    pipeline: Pipeline,
    *,
    count: int = 3,
    start: int = 0,
    seed: int | None = None,
    packed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Encode some rows for showing.

    Args:
        count, start: the rows from `start` on, that give `count` samples in all or are broken.
        seed: take rows at random instead, for data whose number of rows is known.
        packed: also show how they and the samples behind them fill rows of `max_seq_len` tokens (without one: of a
            power of two that holds the longest).
        progress: called with the number of rows that are done, and the most that are read.

    Raises:
        DataError: `start` is behind the last row.
    """
    _tokenizer(pipeline)
    found = Inspection()
    taken: list[tuple[str, Sample]] = []
    prepared = pipeline.description.type == "prepared"
    packed = packed and not prepared
    most = max(count, _LOOK_AHEAD) if packed else count
    for done, (number, row) in enumerate(islice(_rows(pipeline, start, seed), most), 1):
        try:
            if isinstance(row, DataError):
                raise row
            samples = pipeline.encode(row)
        except DataError as error:
            found.broken.append(str(error))
            samples = []
        for piece, sample in enumerate(samples):
            title = row.place if len(samples) == 1 else f"{row.place}, piece {piece + 1}"
            if prepared:
                found.rows.append(_prepared_row(pipeline, title, number, sample))
            elif len(found.samples) < count:
                found.samples.append(_shown(pipeline, title, row, sample))
            taken.append((title, sample))
        if progress is not None:
            progress(done, most)
        if len(found.samples if not prepared else found.rows) + len(found.broken) >= count and not packed:
            break
    if not taken and not found.broken:
        raise DataError(f"there is no row {start}: the data have fewer (rows are counted from 0)")
    if packed:
        found.rows = list(islice(_packed(pipeline, taken), _PACKED_ROWS))
    return found


def replay_step(
    pipeline: Pipeline, run: str | Path, step: int, rank: int, *, media: bool = False
) -> tuple[list[Batch], list[ShownRow]]:
    """The micro-batches that a rank was given in a step of a run, and their rows for showing.

    Args:
        run: its folder, or that of its ledger.
        step: counted over the run from 1.
        media: also show the pictures, videos and sounds of the samples.

    Raises:
        DataError: the ledger has no such step or rank, or the data are not those of the run.
    """
    from .ledger import read_ledger
    from .replay import replay
    from .rows import item_place

    ledger = read_ledger(run)
    attempt, line = ledger.find(step, rank)
    batches = replay(pipeline.dataset(), run, step, rank, collate=pipeline.collator(attempt.settings["packing"]))
    tokenizer = _tokenizer(pipeline)
    seed, lines = ledger.manifest["seed"], attempt.settings["micro_batch_size"]
    rows: list[ShownRow] = []
    for number, batch in enumerate(batches):
        keys = [key for _, keys in line.rows[number * lines : (number + 1) * lines] for key in keys]
        places = [(source, ref) for ref, _, _, source, _ in map(item_place, keys)]
        title = f"Step {step}, rank {rank}, micro-batch {number + 1}"
        names = [pipeline.rows.sources[source].place(ref) for source, ref in places]
        views = view_batch(batch, tokenizer)
        capacity = attempt.settings["max_seq_len"] * (lines if len(views) == 1 else 1)
        shown: list[Medium] = []
        for source, ref in {f"{place}": place for place in places}.values() if media else ():
            part = pipeline.rows.sources[source].part(0, 1, seed=seed, epoch=line.epoch)
            row = pipeline.rows.sources[source].encode(part.fetch(ref))
            shown += media_of(row, pipeline.description.columns, _media_keys(pipeline))
        at = 0
        for index, view in enumerate(views):
            own = names[at : at + len(view.starts)]
            at += len(view.starts)
            first = index == 0
            rows.append(
                ShownRow(
                    title if len(views) == 1 else f"{title}, line {index + 1}",
                    view,
                    max(capacity, len(view)),
                    own,
                    tensor_shapes(batch) if first else {},
                    shown if first else [],
                )
            )
    return batches, rows


def _tokenizer(pipeline: Pipeline) -> Any:
    if pipeline.tokenizer is None:
        raise DataError(f"the tokenizer {pipeline.description.tokenizer} of these data is not there: give its folder")
    return pipeline.tokenizer


def _media_keys(pipeline: Pipeline) -> dict[str, str]:
    """Kind to column, where its name is another than usual."""
    keys = {kind: getattr(pipeline.description, f"{kind}_keys") for kind in KINDS}
    return {kind: name for kind, name in keys.items() if name is not None}


def _rows(pipeline: Pipeline, start: int, seed: int | None) -> Iterator[tuple[int, Any]]:
    """Numbers and rows, or the error of a broken one."""
    if pipeline.description.kind == "iterable":
        if seed is not None:
            raise DataError("rows at random are to be had of data with random access: leave the seed or the stream out")
        return islice(enumerate(pipeline.read()), start, None)
    numbers: Sequence[int] = range(start, len(pipeline.rows))
    if seed is not None:
        numbers = np.random.default_rng(seed).permutation(len(pipeline.rows)).tolist()[start:]
    return zip(numbers, pipeline.read(numbers), strict=True)


def _shown(pipeline: Pipeline, title: str, row: Any, sample: Sample) -> ShownSample:
    shapes = tensor_shapes({key: value for key, value in sample.items() if key not in _TOKEN_TENSORS})
    return ShownSample(
        title,
        view_sample(sample, pipeline.tokenizer),
        source=getattr(row, "source", None),
        media=media_of(row, pipeline.description.columns, _media_keys(pipeline)),
        tensors=shapes,
        row=row_as_text(row),
    )


def _prepared_row(pipeline: Pipeline, title: str, number: int, sample: Sample) -> ShownRow:
    view = view_sample(sample, pipeline.tokenizer)
    shapes = tensor_shapes({key: value for key, value in sample.items() if key not in _TOKEN_TENSORS})
    capacity = pipeline.description.max_seq_len or len(view)
    path = pipeline.description.path
    names = read_places(path, number) if pipeline.description.kind == "mapping" and isinstance(path, str) else []
    return ShownRow(title, view, capacity, names, shapes)


def _packed(pipeline: Pipeline, taken: Sequence[tuple[str, Sample]]) -> Iterator[ShownRow]:
    """Samples as a stream would fill rows with them."""
    longest = max((len(sample["input_ids"]) for _, sample in taken), default=1)
    capacity = pipeline.description.max_seq_len or max(_SHORTEST_ROW, 1 << (longest - 1).bit_length())
    buffer: PackingBuffer[int] = PackingBuffer(
        capacity, _LOOK_AHEAD, length=lambda number: len(taken[number][1]["input_ids"])
    )
    rows = []
    for number, (_, sample) in enumerate(taken):
        if len(sample["input_ids"]) <= capacity and (row := buffer.put(number)) is not None:
            rows.append(row)
    for number, row in enumerate([*rows, *buffer.flush()], 1):
        samples = [taken[i][1] for i in row]
        joined = {
            "input_ids": [token for sample in samples for token in sample["input_ids"]],
            "labels": [label for sample in samples for label in sample["labels"]],
            "seq_lens": [len(sample["input_ids"]) for sample in samples],
        }
        kinds = sorted({kind for sample in samples for kind in modalities_of(sample)})
        shapes = {"with": ", ".join(kinds)} if kinds else {}
        yield ShownRow(
            f"Row {number}", view_sample(joined, pipeline.tokenizer), capacity, [taken[i][0] for i in row], shapes
        )
