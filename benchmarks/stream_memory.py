"""The memory of a streaming run, for JSON lines, Parquet and Arrow: of the reading process and of its worker.

Shards of text are written to a folder, 100 MB each, and streamed once by a process that does nothing else: shuffle
buffer, byte tokens, packed rows of 8,192, one worker process. The figures are the peaks of what lies in memory (VmHWM),
of which a process that has done no more than `import torch` has the part that is given too. A forked worker shares
most of it with the process that started it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lengths import report, write

SHARD_BYTES = 100_000_000


def peak(process: int | str = "self") -> float:
    """The most memory that a process has had, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def write_shards(folder: Path, kind: str, size: float) -> None:
    """Shards of so many bytes in all: lines of 50 to 4,000 random letters."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    for shard in range(max(1, round(size / SHARD_BYTES))):
        letters = rng.integers(97, 123, SHARD_BYTES, dtype=np.uint8).tobytes().decode()
        texts, at = [], 0
        while at < SHARD_BYTES:
            texts.append(letters[at : at + int(rng.integers(50, 4000))])
            at += len(texts[-1])
        table = pa.table({"text": texts})
        if kind == "parquet":
            pq.write_table(table, folder / f"{shard}.parquet")
        elif kind == "arrow":
            with pa.OSFile(str(folder / f"{shard}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as ipc:
                ipc.write_table(table, max_chunksize=10_000)
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{shard}.jsonl").write_text(lines)


def encode(row: Any) -> dict[str, Any]:
    """A token for each byte."""
    import torch

    ids = torch.from_numpy(np.frombuffer(row["text"].encode(), dtype=np.uint8).astype(np.int64))
    return {"input_ids": ids, "labels": ids}


def stream(pattern: str) -> dict[str, float]:
    """An epoch of a pattern of files; the peaks of this process and of its worker."""
    import multiprocessing

    import torch  # noqa: F401

    found = {"import torch": peak()}
    from veomni_data import build_dataloader, build_dataset

    loader = build_dataloader(
        build_dataset(pattern, kind="iterable", transform=encode, shuffle_buffer=1000),
        dp_rank=0,
        dp_size=1,
        micro_batch_size=1,
        global_batch_size=8,
        max_seq_len=8192,
        num_workers=1,
    )
    tokens = 0
    for step in loader:
        tokens += sum(batch["input_ids"].numel() for batch in step)
        (worker,) = multiprocessing.active_children()
        found["worker"] = peak(worker.pid or 0)
    return found | {"reader": peak(), "tokens": tokens}


def main() -> None:
    """Write, stream and report each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10, help="size of the shards of a format")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        print(json.dumps(stream(arguments.stream)))
        return
    figures: dict[str, Any] = {}
    for kind in ("jsonl", "parquet", "arrow"):
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), kind, arguments.gigabytes * 1e9)
            command = [sys.executable, __file__, "--stream", f"{folder}/*.{kind}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures[kind] = json.loads(done.stdout.splitlines()[-1])
    rows = [(kind, *(f"{f[of]:,.0f}" for of in ("import torch", "worker", "reader"))) for kind, f in figures.items()]
    report(f"Peak memory, MB, {arguments.gigabytes:g} GB of each", ("format", "import torch", "worker", "reader"), rows)
    write(arguments.json, figures)


if __name__ == "__main__":
    main()
