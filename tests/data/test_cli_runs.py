from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from veomni_data import build_dataloader
from veomni_data.cli import main
from veomni_data.pipeline import DataDescription, build_pipeline

QUESTIONS = 90

Steps = list[list[dict[str, Any]]]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a tokenizer and some conversations."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {i}? " + "Hello there " * (i % 4)},
                {"role": "assistant", "content": f"Answer {i}."},
            ]
        }
        for i in range(QUESTIONS)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(description: DataDescription, **options: Any) -> Steps:
    """An epoch of a run that keeps a ledger: what each step was given."""
    settings = {"packing": True, "micro_batch_size": 1, **options}
    pipeline = build_pipeline(description)
    loader = build_dataloader(
        pipeline.dataset(),
        dp_rank=0,
        dp_size=1,
        global_batch_size=2,
        max_seq_len=128,
        buffer_size=8,
        seed=5,
        drop_last=False,
        ledger="run/ledger",
        description=pipeline.description.to_dict(),
        collate=pipeline.collator(settings["packing"]),
        **settings,
    )
    return list(loader)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def assert_same(batches: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(batches) == len(expected)
    for batch, wanted in zip(batches, expected, strict=True):
        assert batch.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_replay_gives_the_exact_batch_of_any_step(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    steps = train(DataDescription("chats.jsonl", tokenizer="tokenizer", kind=kind, shuffle_buffer=16))
    assert len(steps) > 5
    for number in (1, len(steps) // 2, len(steps)):
        code, out, err = run(capsys, "replay", "run", "--step", str(number), "--out", "step.pt")
        assert (code, err) == (0, "wrote step.pt\n")
        assert_same(torch.load("step.pt"), steps[number - 1])
        assert f"Step {number}, rank 0, micro-batch 1" in out
        assert "\u27e6Answer " in out
        assert "sample 1: chats.jsonl:" in out


def test_replay_of_padded_rows_pads_as_the_run_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = DataDescription("chats.jsonl", tokenizer="tokenizer", collator="padding", pad_token_id=7)
    steps = train(described, packing=False, micro_batch_size=2)
    padded = next(number for number, (batch,) in enumerate(steps, 1) if (batch["input_ids"] == 7).any())
    out = ("--out", "step.safetensors", "--html", "step.html")
    assert run(capsys, "replay", "run", "--step", str(padded), *out)[0] == 0
    saved = load_file("step.safetensors")
    assert_same([{key.removeprefix("0."): value for key, value in saved.items()}], steps[padded - 1])
    page = Path("step.html").read_text()
    assert f"Step {padded}, rank 0, micro-batch 1, line 2" in page
    assert "attention_mask" in page


def test_replay_does_not_import_what_a_file_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(DataDescription("chats.jsonl", tokenizer="tokenizer"))
    manifest = Path("run/ledger/manifest.json")
    ledger = json.loads(manifest.read_text())
    ledger["description"]["register"] = ["trap_for_replay:spring"]
    manifest.write_text(json.dumps(ledger))
    Path("trap_for_replay.py").write_text("from pathlib import Path\n\nPath('sprung').touch()\nspring = print\n")
    code, _, err = run(capsys, "replay", "run", "--step", "1")
    assert code == 2
    assert "give --register trap_for_replay:spring to call them" in err
    assert run(capsys, "audit", "run", "--read-data")[0] == 0
    assert not Path("sprung").exists()


def test_replay_finds_data_that_were_moved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = train(DataDescription("chats.jsonl", tokenizer="tokenizer"))
    Path("elsewhere").mkdir()
    Path("chats.jsonl").rename("elsewhere/chats.jsonl")
    code, _, err = run(capsys, "replay", "run", "--step", "1")
    assert code == 2
    assert err.startswith("veomni-data: chats.jsonl does not exist")
    moved = ("--data", "elsewhere/chats.jsonl", "--out", "step.pt")
    assert run(capsys, "replay", "run", "--step", "1", *moved)[0] == 0
    assert_same(torch.load("step.pt"), steps[0])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--step", "999"), "has no step 999 of rank 0"),
        (("--step", "1", "--rank", "3"), "has no steps of rank 3: its ranks are 0 to 0"),
        (("--step", "1", "--out", "step.csv"), '".csv" is no kind of file for batches: .safetensors and .pt are'),
    ],
)
def test_a_step_that_is_not_there_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    train(DataDescription("chats.jsonl", tokenizer="tokenizer"))
    code, _, err = run(capsys, "replay", "run", *arguments)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_audit_proves_an_epoch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(DataDescription("chats.jsonl", tokenizer="tokenizer"))
    code, out, err = run(capsys, "audit", "run")
    assert (code, err) == (0, "")
    assert f"{QUESTIONS} samples of {QUESTIONS} examples" in out
    assert out.endswith("no sample was repeated, and none left out\n")


def test_audit_of_a_stream_needs_the_data_for_the_whole_proof(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(DataDescription("chats.jsonl", tokenizer="tokenizer", kind="iterable", shuffle_buffer=16))
    assert run(capsys, "audit", "run")[1].endswith("no sample was repeated\n")
    code, out, _ = run(capsys, "audit", "run", "--read-data")
    assert code == 0
    assert out.endswith("no sample was repeated, and none left out\n")


def test_audit_finds_a_repeated_and_a_left_out_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(DataDescription("chats.jsonl", tokenizer="tokenizer"))
    (file,) = Path("run/ledger").glob("*.jsonl.gz")
    text = zlib.decompressobj(31).decompress(file.read_bytes())  # as far as it is written
    head, *lines = [json.loads(line) for line in text.splitlines()]
    keys = lines[0]["rows"][0][1]
    lost, keys[-1] = keys[-1], keys[0]
    file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in [head, *lines]).encode()))
    code, out, _ = run(capsys, "audit", "run")
    assert code == 1
    assert out.count("WRONG") == 2
    assert f"example {keys[0]} of" in out
    assert f"example {lost} of" in out


def test_a_folder_without_a_ledger_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("audit", "nowhere"), ("replay", "nowhere", "--step", "1")):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert err.startswith("veomni-data: nowhere holds no ledger")
        assert err.count("\n") == 1
