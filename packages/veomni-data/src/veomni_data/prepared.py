"""Rows that are tokenised and packed already, in Arrow files: what `veomni-data prepare` writes and datasets read.

A prepared folder holds `part-00000.arrow`, ... (IPC files) and, once it is whole, `manifest.json`. A row of a part:

| column | type | meaning |
| --- | --- | --- |
| `input_ids` | list<int32>, T | the tokens of all samples of the row |
| `learnt` | list<int32> | lengths of runs: tokens that are not learnt, that are, that are not, ...; their sum is T |
| `labels` | list<int32>, T, or null | only where the label of a learnt token is not the token itself |
| `seq_lens` | list<int32> | the tokens of each sample |
| `places` | list<string> | the file and line that each sample is from |
| `KEY` | struct<dtype, shape, data>, or null | any other tensor of the row, as a collator joins them |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .collators import IGNORED_LABEL, TOKEN_KEYS, Batch, Sample
from .errors import DataError

FORMAT = "veomni-data prepared rows, version 1"
MANIFEST = "manifest.json"
BEGUN = "prepare.json"
_FORMAT_KEY = "veomni_data_format"
_OWN = ("input_ids", "learnt", "labels", "seq_lens", "places")
_OF_THE_COLLATOR = ("shift_labels", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_ROWS_A_BATCH = 64  # list<int32> counts its values by 32 bits in each record batch


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What a prepared folder says of itself; None if the folder is not one.

    Raises:
        DataError: it was begun but is not whole, or parts of it are missing.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        if (folder / BEGUN).is_file():
            raise DataError(f"{folder} is not whole: run the same `veomni-data prepare` again, which goes on with it")
        return None
    for part in manifest["parts"]:
        file = folder / Path(part["file"]).name
        if not file.is_file() or file.stat().st_size != part["bytes"]:
            raise DataError(f"{folder} is damaged: {part['file']} is missing or is not of {part['bytes']:,} bytes")
    return manifest


def is_prepared(schema: Any) -> bool:
    """Whether an Arrow schema is that of a part."""
    return bool((schema.metadata or {}).get(_FORMAT_KEY.encode()) == FORMAT.encode())


def is_prepared_row(row: Any) -> bool:
    """Whether a row of a dataset is a sample that `decode_rows` gave."""
    return "seq_lens" in row and isinstance(row.get("input_ids"), Tensor)


def decode_rows(table: Any) -> Iterator[Sample]:
    """The samples that the rows of a part (an Arrow table or record batch) stand for.

    Returns:
        For each row `input_ids` and `labels`, int64 [T]; `seq_lens`, a list of ints; and the row's other tensors, as a
        collator gives them but for the dimension of size 1 where there is one value a token (`position_ids` are [T] or
        [3, T]).

    Raises:
        DataError: a row is damaged.
    """
    columns = {name: table.column(name) for name in table.schema.names}
    return (_decode_row({name: column[at] for name, column in columns.items()}) for at in range(table.num_rows))


def read_places(folder: str | Path, number: int) -> list[str]:
    """The file and line that each sample of a row of a prepared folder is from."""
    import pyarrow as pa  # type: ignore[import-untyped]

    for part in (read_manifest(folder) or {"parts": []})["parts"]:
        if number < part["rows"]:
            with pa.memory_map(str(Path(folder) / part["file"])) as source:
                places: list[str] = pa.ipc.open_file(source).read_all().column("places")[number].as_py()
            return places
        number -= part["rows"]
    raise IndexError(number)


def encode_prepared_rows(rows: Sequence[Batch], places: Sequence[Sequence[str]], metadata: Mapping[str, str]) -> bytes:
    """An Arrow IPC file of packed rows.

    Args:
        rows: what PackingCollator makes of the samples of each row: ids [1, T] and so on. `position_ids` are kept if
            they are not the ones that simply restart.
        places: the file and line that each sample of each row is from.
        metadata: what else is written into the file's schema.

    Raises:
        DataError: a value that is not a tensor.
    """
    import pyarrow as pa

    records = [_encode_row(row, own) for row, own in zip(rows, places, strict=True)]
    tensor = pa.struct([("dtype", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.large_binary())])
    keys = sorted({key for record in records for key in record} - set(_OWN))
    fields = [(key, pa.list_(pa.string() if key == "places" else pa.int32())) for key in _OWN]
    schema = pa.schema([*fields, *((key, tensor) for key in keys)], metadata={_FORMAT_KEY: FORMAT, **metadata})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for at in range(0, len(records), _ROWS_A_BATCH):
            some = records[at : at + _ROWS_A_BATCH]
            columns = [
                pa.array([record.get(name) for record in some], kind)
                for name, kind in zip(schema.names, schema.types, strict=True)
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue().to_pybytes()


def read_metadata(path: Path) -> dict[str, str] | None:
    """What is written into the schema of a part; None if the file cannot be read whole."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return {key.decode(): value.decode() for key, value in metadata.items()}


def _encode_row(row: Batch, places: Sequence[str]) -> dict[str, Any]:
    ids, labels = row["input_ids"][0], row["labels"][0]
    learnt = labels != IGNORED_LABEL
    edges = torch.nonzero(learnt.diff()).flatten() + 1
    bounds = [0, *edges.tolist(), len(ids)]
    runs = [end - begin for begin, end in pairwise(bounds)]
    lengths = row["cu_seq_lens_q"].diff()
    record: dict[str, Any] = {
        "input_ids": ids.numpy().astype(np.int32),
        "learnt": [0, *runs] if len(ids) and learnt[0] else runs,
        "labels": None if labels[learnt].equal(ids[learnt]) else labels.numpy().astype(np.int32),
        "seq_lens": lengths.tolist(),
        "places": list(places),
    }
    for key, value in row.items():
        if key in _OWN or key in _OF_THE_COLLATOR:
            continue
        if key == "position_ids" and value.equal(torch.cat([torch.arange(n) for n in lengths.tolist()])[None]):
            continue
        if not isinstance(value, Tensor):
            raise DataError(f'"{key}" is a {type(value).__name__}: prepared rows hold tensors', reason="broken sample")
        if key == "position_ids" and value.dim() == 3:
            value = value[:, 0]
        elif key == "position_ids" or key in TOKEN_KEYS:
            value = value[0]
        record[key] = _encode_tensor(value)
    return record


def _decode_row(row: dict[str, Any]) -> Sample:
    """A row of Arrow scalars."""
    ids = torch.from_numpy(_integers(row["input_ids"]))
    if row["labels"].is_valid:
        labels = torch.from_numpy(_integers(row["labels"]))
    else:
        runs = _integers(row["learnt"])
        learnt = torch.from_numpy(np.repeat(np.arange(len(runs)) % 2 == 1, runs))
        if len(learnt) != len(ids):
            raise DataError(f"a prepared row has {len(ids)} tokens but a mask of {len(learnt)}", reason="bad row")
        labels = torch.where(learnt, ids, IGNORED_LABEL)
    sample: Sample = {"input_ids": ids, "labels": labels, "seq_lens": row["seq_lens"].as_py()}
    for key, value in row.items():
        if key not in _OWN and value.is_valid:
            sample[key] = _decode_tensor(value.as_py())
    return sample


def _integers(values: Any) -> npt.NDArray[np.int64]:
    return np.array(values.values.to_numpy(), np.int64)


def _encode_tensor(value: Tensor) -> dict[str, Any]:
    data = value.detach().cpu().contiguous()
    return {
        "dtype": str(data.dtype).removeprefix("torch."),
        "shape": list(data.shape),
        "data": data.reshape(-1).view(torch.uint8).numpy().tobytes(),
    }


def _decode_tensor(value: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, value["dtype"])
    data = torch.frombuffer(bytearray(value["data"]), dtype=torch.uint8) if len(value["data"]) else torch.empty(0)
    return data.view(dtype).reshape(value["shape"]) if data.numel() else torch.empty(value["shape"], dtype=dtype)
