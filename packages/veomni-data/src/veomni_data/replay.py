"""Makes a batch of a run again, from the run's ledger and the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .collators import Batch, PackingCollator, PaddingCollator, Sample
from .encoding import Encoder, Request
from .errors import DataError
from .ledger import read_ledger
from .multisource import shard_part
from .rows import example_name, item_place
from .source import Part, Ref, sources_of


def replay(
    dataset: Any,
    folder: str | Path,
    step: int,
    rank: int = 0,
    *,
    collate: Callable[[list[Sample]], Batch] | None = None,
) -> list[Batch]:
    """The micro-batches that a rank was given in a step, the same to the bit.

    That takes a transform that makes the same sample of a row each time. Nothing but that step is read.

    Args:
        dataset: as it was given to `build_dataloader`.
        folder: of the ledger or of the run.
        step: counted over the run from 1.
        rank: of the data-parallel ranks that there were in that step.
        collate: as it was given to `build_dataloader`.

    Raises:
        DataError: the ledger has no such step or rank, or the data are not those of the run.
    """
    ledger = read_ledger(folder)
    attempt, line = ledger.find(step, rank)
    settings, manifest = attempt.settings, ledger.manifest
    sources, _ = sources_of(dataset)
    if [[s.name, s.rows] for s in sources] != [[s["name"], s["rows"]] for s in manifest["sources"]]:
        raise DataError(
            f"the data are not those of {ledger.folder}, which had "
            + ", ".join(f"{s['name']} ({s['rows']} rows)" for s in manifest["sources"])
            + " but these have "
            + ", ".join(f"{s.name} ({s.rows} rows)" for s in sources)
        )
    encode = Encoder(sources, ("input_ids",), settings["max_seq_len"], settings["too_long"])
    shards = manifest["global_batch_size"]
    wanted: dict[str, tuple[int, int, int, Ref]] = {}
    for shard, keys in line.rows:
        for key in keys:
            ref, _, _, source, passes = item_place(key)
            wanted[example_name(source, passes, ref)] = (source, passes, shard, ref)

    def part(source: int, passes: int, shard: int) -> Part:
        return shard_part(sources[source], shard, shards, passes, seed=manifest["seed"], epoch=line.epoch)

    parts = {place[:3]: part(*place[:3]) for place in wanted.values()}
    samples: dict[str, list[Sample]] = {}
    # ascending, so that a stream is read forward
    for name, (source, passes, shard, ref) in sorted(wanted.items(), key=lambda each: (each[1][:2], each[1][3])):
        example = encode(Request(source, ref, parts[source, passes, shard].fetch(ref)))
        if example.fault is not None:
            raise DataError(example.fault[0], reason=example.fault[1])
        samples[name] = example.samples
    rows: list[list[Sample]] = []
    for _, keys in line.rows:
        row = []
        for key in keys:
            ref, piece, pieces, source, passes = item_place(key)
            made = samples[example_name(source, passes, ref)]
            if len(made) != pieces:
                raise DataError(f"{sources[source].place(ref)} gives {len(made)} samples, but gave {pieces} in the run")
            row.append(made[piece])
        rows.append(row)
    size = settings["micro_batch_size"]
    collate = collate or (PackingCollator() if settings["packing"] else PaddingCollator())
    return [collate([sample for row in rows[i : i + size] for sample in row]) for i in range(0, len(rows), size)]
