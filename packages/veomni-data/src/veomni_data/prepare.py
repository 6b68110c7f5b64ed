"""Tokenise and pack once, into Arrow files: resumable, and the same bytes for any number of workers."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .collators import IGNORED_LABEL, PackingCollator, Sample
from .errors import DataError
from .lengths import POLICIES, TooLong, fit_sample
from .packing import pack
from .pipeline import DataDescription, Pipeline, build_pipeline, run_workers
from .prepared import BEGUN, FORMAT, MANIFEST, encode_prepared_rows, read_manifest, read_metadata

SKIPPED = "skipped.jsonl"
_METADATA = "veomni_data"
_COUNTED = {"drop": "dropped", "truncate": "truncated", "split": "split"}
_LONGER = tuple(_COUNTED.values())
_JUDGED_FROM = 1000  # rows: a share of fewer says little


def prepare(
    description: DataDescription,
    out: str | Path,
    *,
    too_long: TooLong = "drop",
    rows_per_part: int | None = None,
    seed: int | None = 0,
    workers: int = 0,
    max_skipped: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the data of a description as packed rows of at most `max_seq_len` tokens, which `build_dataset(out)` reads.

    Part i is made of the i-th lot of `rows_per_part` input rows alone, so that it has the same bytes whoever makes it;
    it appears under its name when it is whole. If this is ended at any moment, the same call goes on: parts that are
    there stay. `manifest.json`, without which the folder cannot be read, is written last.

    Args:
        description: of `kind` "mapping", with a `max_seq_len`.
        too_long: what becomes of a sample of more tokens, see `fit_sample`; text is always split.
        rows_per_part: input rows of a part; None is 8,192, or 512 for data with pictures, video or sound.
        seed: of the order in which input rows meet in the rows of a part; None is the order of the files.
        workers: processes that make parts; 0 is this one.
        max_skipped: the share of broken input rows from which on this ends with an error. They are left out and
            written to `skipped.jsonl`.
        progress: called with the number of input rows that are done, and of all.

    Returns:
        The manifest: the description, sizes, the parts, and how much was left out and why.

    Raises:
        DataError: the folder holds something else, or was begun for other data or settings; the data cannot be
            prepared (a stream, a mixture by weights, prepared rows); too many broken rows.
    """
    if workers < 0 or (rows_per_part is not None and rows_per_part < 1):
        raise DataError(f"rows_per_part={rows_per_part} must be at least 1, and workers={workers} at least 0")
    if too_long not in POLICIES:
        raise DataError(f'too_long="{too_long}" is none of {", ".join(POLICIES)}')
    if (description.max_seq_len or 0) < 1:
        raise DataError(f"max_seq_len={description.max_seq_len}: rows of at least 1 token are needed")
    if description.kind != "mapping":
        raise DataError(f'prepare reads rows by their number, which kind="{description.kind}" has not: use "mapping"')
    pipeline = build_pipeline(description)
    if pipeline.description.type == "prepared":
        raise DataError(f"{description.path} is prepared already")
    if pipeline.rows.mixture is not None:
        raise DataError(
            f"{description.path} has a schedule of weights, which apply while training: prepare each of its sources, "
            f"and name the prepared folders in the file"
        )
    if rows_per_part is None:
        rows_per_part = 512 if pipeline.description.type == "multimodal" else 8192
    out = Path(out)
    request = {
        "format": FORMAT,
        "description": pipeline.description.to_dict(),
        "too_long": too_long,
        "rows_per_part": rows_per_part,
        "seed": seed,
        "input_rows": len(pipeline.rows),
        "input_bytes": _input_bytes(pipeline),
        "tokenizer_sha256": _tokenizer_digest(pipeline),
    }
    manifest = read_finished(out, request)
    if manifest is not None:
        return manifest
    with _begin(out, request):
        parts = _Parts(pipeline, out, request)
        totals = _Totals(max_skipped, len(pipeline.rows))
        done = 0
        for number, record in _make(parts, workers):
            before, done = done, min((number + 1) * rows_per_part, len(pipeline.rows))
            totals.add(record, done - before)
            if progress is not None:
                progress(done, len(pipeline.rows))
        return _finish(out, request, totals, parts)


def _input_bytes(pipeline: Pipeline) -> int:
    """The bytes of the data files, by which it is seen that they changed."""
    files = [getattr(file, "file", None) for source in pipeline.rows.sources for file, _ in source.files]
    return sum(file.size or 0 for file in files if file is not None)


def _tokenizer_digest(pipeline: Pipeline) -> str:
    """By which it is seen that what lies in the tokenizer's folder, or its chat template, changed."""
    tokenizer = pipeline.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [vocabulary, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read_finished(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of what was asked for, if the folder holds it whole; DataError if it holds something else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise DataError(f"{out} is a file: name a new folder")
    begun = out / BEGUN
    manifest = None if begun.is_file() else read_manifest(out)
    if manifest is not None:
        _check_same(out, manifest, request)
        return manifest
    if not begun.is_file() and any(out.iterdir()):
        raise DataError(f"{out} is not empty and holds no prepared data: name a new folder")
    return None


@contextmanager
def _begin(out: Path, request: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for this process alone, with the request written down, and without parts that are not whole."""
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    begun = out / BEGUN
    # a lock of the process: workers do not inherit it, so that those of a killed run do not keep it
    with begun.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{out} is being prepared by another process") from error
        file.seek(0)
        try:
            earlier = json.load(file)
        except ValueError:  # new, or killed while it was written: no part was made yet
            write_whole(begun, (json.dumps(request, indent=2) + "\n").encode())
        else:
            _check_same(out, earlier, request)
        for left in out.glob("*.tmp"):
            left.unlink()
        yield


def _check_same(out: Path, earlier: dict[str, Any], request: dict[str, Any]) -> None:
    for key, value in request.items():
        if earlier.get(key) != value:
            raise DataError(
                f"{out} was prepared with {key} {_short(earlier.get(key))}, now it is {_short(value)}: give the same, "
                f"or name a new folder"
            )


def _short(value: Any) -> str:
    return json.dumps(value)


class _Parts:
    """The parts by their number: made when they are asked for, unless they are there. What is given is their record."""

    def __init__(self, pipeline: Pipeline, out: Path, request: dict[str, Any]) -> None:
        self._pipeline = pipeline
        self._out = out
        self._request = request
        self._digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        self._lot = request["rows_per_part"]
        self._count = -(-request["input_rows"] // self._lot)
        self._order: Any = range(request["input_rows"])
        if request["seed"] is not None:
            self._order = np.random.default_rng(request["seed"]).permutation(request["input_rows"])

    def __len__(self) -> int:
        return self._count

    def path(self, number: int) -> Path:
        """The file of a part."""
        return self._out / f"part-{number:0{max(5, len(str(self._count - 1)))}}.arrow"

    def __getitem__(self, number: int) -> tuple[int, dict[str, Any] | str]:
        """The number and what is known of the part, or the one sentence of a mistake in all of it."""
        if not 0 <= number < self._count:
            raise IndexError(number)
        record = self._read(number)
        try:
            return number, record if record is not None else self._make(number)
        except DataError as error:  # an exception that leaves a worker arrives as one of many lines
            return number, str(error)

    def _read(self, number: int) -> dict[str, Any] | None:
        path = self.path(number)
        metadata = read_metadata(path) if path.exists() else None
        record = json.loads((metadata or {}).get(_METADATA, "{}"))
        return record if record.get("request") == self._digest else None

    def _make(self, number: int) -> dict[str, Any]:
        samples: list[Sample] = []
        places: list[list[str]] = []  # of each sample, for those that it is made of
        record: dict[str, Any] = {"request": self._digest, "skipped": [], **dict.fromkeys(_LONGER, 0)}
        sources: Counter[str] = Counter()
        for index in self._order[number * self._lot : (number + 1) * self._lot]:
            try:
                row = self._pipeline.rows[int(index)]
                made = self._fit(self._pipeline.encode(row), record)
            except DataError as error:
                record["skipped"].append({"row": int(index), "reason": error.reason, "message": str(error)})
                continue
            samples += made
            places += [[row.place] * len(sample.get("seq_lens", [0])) for sample in made]
            sources[getattr(row, "source", None) or ""] += sum(len(sample["input_ids"]) for sample in made)
        rows = pack([len(sample["input_ids"]) for sample in samples], self._request["description"]["max_seq_len"])
        collate = PackingCollator(text_positions=False)  # which are made anew when the row is collated
        try:
            batches = [collate([samples[i] for i in row]) for row in rows]
        except DataError as error:  # samples that do not go together in a row
            raise DataError(f"rows cannot be packed: {error}") from error
        record |= {
            "rows": len(rows),
            "samples": len(samples),
            "tokens": sum(len(sample["input_ids"]) for sample in samples),
            "targets": sum(int((batch["shift_labels"] != IGNORED_LABEL).sum()) for batch in batches),
            "sources": dict(sorted(sources.items())),
        }
        metadata = {_METADATA: json.dumps(record)}
        write_whole(
            self.path(number),
            encode_prepared_rows(batches, [[place for i in row for place in places[i]] for row in rows], metadata),
        )
        return record

    def _fit(self, samples: list[Sample], record: dict[str, Any]) -> list[Sample]:
        """The samples as those that fit a row; what is done to longer ones is counted."""
        longest, policy = self._request["description"]["max_seq_len"], self._request["too_long"]
        fitting: list[Sample] = []
        for sample in samples:
            fitting += fit_sample(sample, longest, policy)
            if len(sample["input_ids"]) > longest:
                record[_COUNTED[policy]] += 1
        return fitting


def _make(parts: _Parts, workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of all parts, in order."""
    for number, record in run_workers(parts, workers, range(len(parts))):
        if isinstance(record, str):
            raise DataError(record)
        yield number, record


class _Totals:
    """The sums over parts, and whether too much was left out."""

    def __init__(self, max_skipped: float, rows: int) -> None:
        self.skipped: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self._max_skipped = max_skipped
        self._rows = rows
        self._seen = 0

    def add(self, record: dict[str, Any], rows: int) -> None:
        """Take a part's record in; DataError if more than `max_skipped` of the rows up to here are broken."""
        self._seen += rows
        self.skipped += record["skipped"]
        self.sources.update(record["sources"])
        self.counts.update({key: record[key] for key in ("rows", "samples", "tokens", "targets", *_LONGER)})
        allowed = self._max_skipped * max(self._seen, min(self._rows, _JUDGED_FROM))
        if len(self.skipped) > allowed:
            raise DataError(
                f"{len(self.skipped)} of the first {self._seen} rows are broken ({_reasons(self.skipped)}), more than "
                f"max_skipped={self._max_skipped:g} allows; the first: {self.skipped[0]['message']}"
            )


def _reasons(skipped: list[dict[str, Any]]) -> str:
    counts = Counter(entry["reason"] for entry in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _finish(out: Path, request: dict[str, Any], totals: _Totals, parts: _Parts) -> dict[str, Any]:
    """Write the manifest, by which the folder becomes readable."""
    if not totals.counts["rows"]:
        for number in range(len(parts)):
            parts.path(number).unlink()
        (out / BEGUN).unlink()
        if not any(out.iterdir()):
            out.rmdir()
        longer = [f"{totals.counts[how]} {how} as too long for a row" for how in _LONGER if totals.counts[how]]
        reasons = ", ".join(filter(None, [_reasons(totals.skipped), *longer]))
        raise DataError(
            f"nothing of the {request['input_rows']} rows could be prepared: {reasons or 'they hold no token'}"
        )
    entries = []
    for number in range(len(parts)):
        path = parts.path(number)
        record = parts[number][1]
        assert isinstance(record, dict)
        if record["rows"]:
            entries.append({"file": path.name, "rows": record["rows"], "bytes": path.stat().st_size})
        else:
            path.unlink()
    if totals.skipped:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in totals.skipped)
        write_whole(out / SKIPPED, lines.encode())
    manifest = {
        **request,
        **totals.counts,
        "fullness": totals.counts["tokens"] / (totals.counts["rows"] * request["description"]["max_seq_len"]),
        "sources": {name: tokens for name, tokens in sorted(totals.sources.items()) if name},
        "skipped": dict(Counter(entry["reason"] for entry in totals.skipped)),
        "parts": entries,
    }
    write_whole(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    (out / BEGUN).unlink()
    return manifest


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all, also after the power went."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
