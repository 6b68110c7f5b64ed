from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from veomni_data import DataError, PackingCollator, build_dataloader, build_dataset
from veomni_data.chat_template import CHATML
from veomni_data.pipeline import DataDescription, build_pipeline
from veomni_data.prepare import prepare
from veomni_data.prepared import decode_rows, encode_prepared_rows

ROWS = 60


@pytest.fixture
def chats(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> DataDescription:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}? " + "Hello there " * (i % 7)},
                {"role": "assistant", "content": f"It is {i}, " + "three, five " * (i % 5)},
            ]
        }
        for i in range(ROWS)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataDescription(str(tmp_path / "chats.jsonl"), tokenizer=str(tmp_path / "tokenizer"), max_seq_len=256)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples_of(rows: Any) -> list[tuple[list[int], list[int]]]:
    """The ids and labels of each sample within rows, sorted."""
    found = []
    for row in rows:
        bounds = [0, *torch.tensor(row.get("seq_lens", [len(row["input_ids"])])).cumsum(0).tolist()]
        found += [(row["input_ids"][a:b].tolist(), row["labels"][a:b].tolist()) for a, b in pairwise(bounds)]
    return sorted(found)


def test_prepared_rows_hold_each_sample_once_with_its_labels(chats: DataDescription, tmp_path: Path) -> None:
    manifest = prepare(chats, tmp_path / "out", rows_per_part=16)
    rows = build_dataset(tmp_path / "out")
    assert samples_of(rows) == samples_of(build_pipeline(chats).dataset())
    assert len(rows) == manifest["rows"]
    assert manifest["samples"] == ROWS
    assert manifest["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert all(len(row["input_ids"]) <= 256 for row in rows)
    # the first token of a sample is no target
    batches = [PackingCollator()([row]) for row in rows]
    assert manifest["targets"] == sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)


def test_a_prepared_row_makes_the_batch_of_its_samples(chats: DataDescription, tmp_path: Path) -> None:
    prepare(chats, tmp_path / "out", rows_per_part=ROWS)
    row = build_dataset(tmp_path / "out")[0]
    assert len(row["seq_lens"]) > 1
    bounds = [0, *torch.tensor(row["seq_lens"]).cumsum(0).tolist()]
    apart = [{key: row[key][a:b] for key in ("input_ids", "labels")} for a, b in pairwise(bounds)]
    whole, joined = PackingCollator()([dict(row)]), PackingCollator()(apart)
    assert whole.keys() == joined.keys()
    for key, value in whole.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(joined[key])), key


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_both_kinds_of_dataset_and_a_mixture_read_prepared_rows(
    chats: DataDescription, tmp_path: Path, kind: str
) -> None:
    prepare(chats, tmp_path / "out", rows_per_part=16)
    (tmp_path / "mix.yaml").write_text("sources: [out]\n")
    expected = samples_of(build_dataset(tmp_path / "out"))
    assert samples_of(build_dataset(tmp_path / "out", kind=kind)) == expected
    assert samples_of(build_dataset(tmp_path / "mix.yaml", kind=kind)) == expected


def test_a_transform_leaves_prepared_rows_as_they_are(chats: DataDescription, tmp_path: Path) -> None:
    prepare(chats, tmp_path / "out")

    def encode(row: Any) -> Any:
        raise AssertionError("a prepared row has its tokens already")

    assert samples_of(build_dataset(tmp_path / "out", transform=encode)) == samples_of(build_dataset(tmp_path / "out"))


def test_the_loader_takes_a_prepared_row_as_a_row(chats: DataDescription, tmp_path: Path) -> None:
    prepare(chats, tmp_path / "out", rows_per_part=16)
    rows = build_dataset(tmp_path / "out")
    loader = build_dataloader(
        rows,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=1,
        global_batch_size=1,
        max_seq_len=256,
        packing=False,
        collate=PackingCollator(),
    )
    given = sorted(batch["input_ids"][0].tolist() for batches in loader for batch in batches)
    assert given == sorted(row["input_ids"].tolist() for row in rows)


def test_the_bytes_do_not_depend_on_the_number_of_workers(chats: DataDescription, tmp_path: Path) -> None:
    prepare(chats, tmp_path / "none", rows_per_part=7)
    prepare(chats, tmp_path / "two", rows_per_part=7, workers=2)
    assert files_of(tmp_path / "none") == files_of(tmp_path / "two")


def test_a_preparation_that_was_stopped_goes_on_to_the_same_bytes(chats: DataDescription, tmp_path: Path) -> None:
    prepare(chats, tmp_path / "whole", rows_per_part=10)

    def stop(done: int, total: int) -> None:
        if done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(chats, tmp_path / "out", rows_per_part=10, progress=stop)
    with pytest.raises(DataError, match="not whole: run the same"):
        build_dataset(tmp_path / "out")
    (tmp_path / "out" / "part-00004.arrow.77.tmp").write_bytes(b"half a part")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*.arrow")}
    assert sorted(kept) == ["part-00000.arrow", "part-00001.arrow", "part-00002.arrow"]
    prepare(chats, tmp_path / "out", rows_per_part=10)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept


def test_a_damaged_part_is_made_again(chats: DataDescription, tmp_path: Path) -> None:
    prepare(chats, tmp_path / "whole", rows_per_part=10)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(chats, tmp_path / "out", rows_per_part=10, progress=stop)
    part = tmp_path / "out" / "part-00000.arrow"
    part.write_bytes(part.read_bytes()[:-100])
    prepare(chats, tmp_path / "out", rows_per_part=10)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.timeout(90)
def test_a_killed_command_goes_on_to_the_same_bytes(chats: DataDescription, tmp_path: Path) -> None:
    prepare(chats, tmp_path / "whole", rows_per_part=2)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "veomni_data.cli", "prepare", str(chats.path), str(out), "--workers", "2"]
    command += ["--tokenizer", str(chats.tokenizer), "--max-seq-len", "256", "--rows-per-part", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 60
    while not (out / "part-00001.arrow").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (out / "part-00001.arrow").exists()
    prepare(chats, out, rows_per_part=2)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(chats: DataDescription, tmp_path: Path) -> None:
    first = prepare(chats, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare(chats, tmp_path / "out", workers=2) == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(DataError, match=r"prepared with seed 0, now it is 1: give the same, or name a new folder"):
        prepare(chats, tmp_path / "out", seed=1)
    with Path(str(chats.path)).open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    with pytest.raises(DataError, match="prepared with input_rows 60, now it is 61"):
        prepare(chats, tmp_path / "out")


def test_a_tokenizer_that_changed_in_its_folder_is_seen(chats: DataDescription, tmp_path: Path) -> None:
    prepare(chats, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(chats.tokenizer)
    tokenizer.chat_template = CHATML.replace("system", "sys") + "{# changed #}"
    tokenizer.save_pretrained(chats.tokenizer)
    with pytest.raises(DataError, match="was prepared with tokenizer_sha256"):
        prepare(chats, tmp_path / "out")


def test_where_nothing_can_be_prepared_it_is_said_why_and_nothing_stays(chats: DataDescription, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"nothing of the {ROWS} rows .*: {ROWS} dropped as too long for a row"):
        prepare(dataclasses.replace(chats, max_seq_len=8), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_not_written_into(chats: DataDescription, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="is not empty and holds no prepared data"):
        prepare(chats, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_broken_rows_are_named_and_too_many_of_them_stop(chats: DataDescription, tmp_path: Path) -> None:
    lines = Path(str(chats.path)).read_text().splitlines()
    lines[3], lines[40] = "{broken", json.dumps({"messages": []})
    Path(str(chats.path)).write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"2 of the first 60 rows are broken \(.*\), more than max_skipped=0.01 allows"):
        prepare(chats, tmp_path / "out")
    manifest = prepare(chats, tmp_path / "out", max_skipped=0.1)
    assert sum(manifest["skipped"].values()) == 2
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["row"] for entry in skipped) == [3, 40]
    assert any("chats.jsonl:4: this line is not JSON" in entry["message"] for entry in skipped)
    assert manifest["samples"] == len(samples_of(build_dataset(tmp_path / "out"))) == ROWS - 2


def test_in_order_keeps_the_neighbours_of_the_file(chats: DataDescription, tmp_path: Path) -> None:
    prepare(chats, tmp_path / "out", rows_per_part=10, seed=None)
    own = build_pipeline(chats).dataset()
    first = samples_of(own[i] for i in range(10))
    in_parts = json.loads((tmp_path / "out" / "manifest.json").read_text())["parts"]
    rows = build_dataset(tmp_path / "out")
    assert samples_of(rows[i] for i in range(in_parts[0]["rows"])) == first


def test_plain_text_loses_no_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = ["Hello there world " * n for n in (1, 40, 7)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    described = DataDescription(str(tmp_path / "texts.jsonl"), tokenizer=str(tmp_path / "tokenizer"), max_seq_len=32)
    manifest = prepare(described, tmp_path / "out")
    assert manifest["description"]["type"] == "plaintext"
    expected = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert manifest["tokens"] == sum(len(row["input_ids"]) for row in build_dataset(tmp_path / "out")) == expected


def test_streams_mixtures_and_prepared_data_are_refused(chats: DataDescription, tmp_path: Path) -> None:
    with pytest.raises(DataError, match='use "mapping"'):
        prepare(dataclasses.replace(chats, kind="iterable"), tmp_path / "out")
    (tmp_path / "mix.yaml").write_text(
        "sources: [chats.jsonl]\nnames: [a]\nschedule: [{schedule_type: const, weights: [1]}]\n"
    )
    with pytest.raises(DataError, match="has a schedule of weights"):
        prepare(dataclasses.replace(chats, path=str(tmp_path / "mix.yaml")), tmp_path / "out")
    prepare(chats, tmp_path / "out")
    with pytest.raises(DataError, match="is prepared already"):
        prepare(dataclasses.replace(chats, path=str(tmp_path / "out")), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_any_tensor_and_any_label_survives_the_file(tmp_path: Path) -> None:
    import pyarrow as pa

    samples = [
        {
            "input_ids": torch.tensor([5, 6, 7]),
            "labels": torch.tensor([5, 6, -100]),
            "position_ids": torch.tensor([[0, 1, 1], [0, 1, 2], [0, 1, 3]]),
            "pixel_values": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
            "mm_token_type_ids": torch.tensor([0, 1, 1]),
        },
        {
            "input_ids": torch.tensor([8, 9]),
            "labels": torch.tensor([-100, 4]),  # not the token itself
            "position_ids": torch.tensor([[0, 1], [0, 1], [0, 1]]),
            "pixel_values": torch.full((1, 3), 7, dtype=torch.bfloat16),
            "mm_token_type_ids": torch.tensor([0, 0]),
        },
    ]
    direct = PackingCollator()(samples)
    data = encode_prepared_rows([PackingCollator(text_positions=False)(samples)], [["a:1", "a:2"]], {})
    (row,) = decode_rows(pa.ipc.open_file(pa.BufferReader(data)).read_all())
    again = PackingCollator()([row])
    assert again.keys() == direct.keys()
    for key, value in direct.items():
        other = torch.as_tensor(again[key])
        assert other.dtype == torch.as_tensor(value).dtype, key
        assert torch.equal(other, torch.as_tensor(value)), key


@pytest.mark.parametrize(("policy", "counted"), [("drop", "dropped"), ("truncate", "truncated"), ("split", "split")])
def test_what_becomes_of_long_samples_is_chosen_and_counted(
    chats: DataDescription, tmp_path: Path, policy: Any, counted: str
) -> None:
    whole = samples_of(build_pipeline(chats).dataset())
    short = dataclasses.replace(chats, max_seq_len=40)
    longer = [ids for ids, _ in whole if len(ids) > 40]
    assert 0 < len(longer) < ROWS
    manifest = prepare(short, tmp_path / "out", too_long=policy, max_skipped=1)
    broken = sum(manifest["skipped"].values())  # cut off before the answer
    assert manifest[counted] + broken == len(longer)
    tokens = sum(len(ids) for ids, _ in whole)
    if policy == "split":
        assert manifest["tokens"] == tokens
    elif policy == "drop":
        assert manifest["tokens"] == tokens - sum(map(len, longer))
    else:
        assert manifest["tokens"] == sum(min(len(ids), 40) for ids, _ in whole) - 40 * broken
