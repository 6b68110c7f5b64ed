"""Sources that are mixed, streams, broken samples and the ledger, through the whole recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from veomni_config import OmniRecipeConfig, parse_args
from veomni_data import audit
from veomni_data.cli import main as data_command
from veomni_recipes.tasks.omni.train_omni_model import main
from veomni_recipes.training_data import row_budget, row_options


def run(arguments: list[str], *changes: str) -> list[dict[str, object]]:
    main([*arguments, *changes])
    output = next(c.partition("=")[2] for c in changes if c.startswith("--train.output_dir="))
    return [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]


def test_a_stream_of_two_sources_with_broken_samples_trains_and_its_ledger_proves_every_sample(
    tmp_path: Path, arguments: list[str], digits_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (digits_folder / "train.jsonl").read_text().splitlines()
    lines = [line.replace('"images/', f'"{digits_folder}/images/') for line in lines]
    broken = json.dumps({"messages": [{"role": "user", "content": "<image> what?"}], "images": ["nowhere.png"]})
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:300], broken]))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[300:900]))
    mix = "sources: [a.jsonl, b.jsonl]\nschedule: [{schedule_type: const, weights: [1, 3]}]\nstopping: all_exhausted\n"
    (tmp_path / "mix.yaml").write_text(mix)
    metrics = run(
        [a for a in arguments if not a.startswith("--data.train_path")],
        f"--data.train_path={tmp_path}/mix.yaml",
        "--data.datasets_type=iterable",
        "--data.max_skipped=0.1",
        "--train.max_steps=12",
        f"--train.output_dir={tmp_path}/run",
    )
    assert len(metrics) == 12
    shares = metrics[-1]["shares"]
    assert shares["b"] == pytest.approx(0.75, abs=0.15)
    assert shares["a"] + shares["b"] == pytest.approx(1, abs=1e-5)
    report = audit(tmp_path / "run" / "ledger")
    assert report.ok, str(report)

    capsys.readouterr()
    register = ["--register", "veomni_models:register_omni_model"]
    assert data_command(["replay", f"{tmp_path}/run", "--step", "5", *register]) == 0
    assert "<|im_start|>" in capsys.readouterr().out
    assert data_command(["audit", f"{tmp_path}/run"]) == 0


def test_broken_samples_are_skipped_counted_and_named(
    tmp_path: Path, arguments: list[str], digits_folder: Path
) -> None:
    lines = (digits_folder / "train.jsonl").read_text().splitlines()
    lines = [line.replace('"images/', f'"{digits_folder}/images/') for line in lines[:400]]
    lines[7] = "{not JSON"
    lines[9] = json.dumps({"messages": [{"role": "user", "content": "<image>"}], "images": ["nowhere.png"]})
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    run(
        [a for a in arguments if not a.startswith("--data.train_path")],
        f"--data.train_path={tmp_path}/train.jsonl",
        "--data.train_size=1000000",
        f"--train.output_dir={tmp_path}/run",
    )
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(skip["place"].rpartition(":")[2] for skip in skipped) == ["10", "8"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(summary["left_out_samples"].values()) == 2


def test_the_budget_grows_in_a_straight_line_to_what_a_micro_batch_holds(arguments: list[str]) -> None:
    changes = ["--train.output_dir=unused", "--train.micro_batch_size=2", "--data.max_seq_len=100"]
    warmup = ["--train.dyn_bsz_margin=20", "--train.bsz_warmup_ratio=0.5", "--train.bsz_warmup_init_mbtoken=60"]
    budget = row_budget(parse_args(OmniRecipeConfig, [*arguments, *changes, *warmup]), total_steps=20)
    assert budget is not None
    assert [budget(step) for step in (0, 5, 10, 19)] == [30, 60, 90, 90]
    assert row_budget(parse_args(OmniRecipeConfig, [*arguments, *changes]), total_steps=20) is None


def test_effective_tokens_and_equal_work_reach_the_loader(arguments: list[str]) -> None:
    changes = ["--train.output_dir=unused", "--train.dyn_bsz_count_mode=effective", "--train.balance_ranks=true"]
    options = row_options(parse_args(OmniRecipeConfig, [*arguments, *changes]), total_steps=20, hidden_size=128)
    assert options["count"] == "targets"
    assert options["max_row_tokens"] == 384
    assert options["cost"]({"input_ids": [1] * 1536}) == 1536 + 1536  # attention costs as much as the rest at 12 x 128
