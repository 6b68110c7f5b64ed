from __future__ import annotations

import gzip
import json
import random
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_data import DataError, audit, build_dataset, read_ledger, replay

from tests.data.loading import ROWS, encode, encode_pieces, loader, numbers, plain, samples, together, write_rows


def tamper(folder: Path, change: Any) -> None:
    """Change the lines of the first file of a ledger."""
    file = sorted(folder.glob("*.gz"))[0]
    packed = file.read_bytes()
    lines = [json.loads(line) for line in zlib.decompressobj(31).decompress(packed).splitlines()]
    change(lines)
    file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def run(data: Any, ledger: Path, steps: int | None = None, **kwargs: Any) -> list[list[int]]:
    each = loader(data, ledger=ledger, **kwargs)
    return [numbers(step) for _, step in zip(range(steps or 10**6), each, strict=False)]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_a_whole_epoch_is_proven(tmp_path: Path, drop_last: bool, packing: bool) -> None:
    data = samples(300)
    data[5] = {"input_ids": [9] * 99, "labels": [9] * 99}
    data[9] = {"input_ids": [9] * 3}
    made = run(data, tmp_path, drop_last=drop_last, packing=packing)
    report = audit(tmp_path)
    assert report.ok, str(report)
    (epoch,) = report.epochs
    assert (epoch.epoch, epoch.first, epoch.last, epoch.ended) == (0, 1, len(made), True)
    assert epoch.samples == sum(map(len, made))
    assert epoch.out == {"too long for a row": 1, "broken sample": 1}
    assert epoch.held == 298 - epoch.samples
    assert (epoch.held == 0) is not drop_last
    assert not epoch.unproven


def test_a_run_under_way_is_proven_too(tmp_path: Path) -> None:
    run(samples(600), tmp_path, steps=7)
    (epoch,) = audit(tmp_path).epochs
    assert not epoch.problems
    assert not epoch.ended
    assert epoch.last == 7
    assert epoch.held


@pytest.mark.parametrize("packing", [True, False])
def test_a_sample_that_was_given_again_is_found(tmp_path: Path, packing: bool) -> None:
    run(samples(600), tmp_path, packing=packing)

    def repeat(lines: list[Any]) -> None:
        lines[4]["rows"][3][1].append(lines[2]["rows"][3][1][0])

    tamper(tmp_path, repeat)
    ref = read_ledger(tmp_path)
    line = list(ref.lines(ref.attempts[0]))[1]
    (problem,) = audit(tmp_path).epochs[0].problems
    assert problem == f'example {line.rows[3][1][0][0]} of "data" was given in step 2 and again in step 4'


@pytest.mark.parametrize("steps", [12, None])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_a_sample_that_was_left_out_is_found(tmp_path: Path, steps: int | None, drop_last: bool, packing: bool) -> None:
    run(samples(1200), tmp_path, steps, packing=packing, drop_last=drop_last)
    left_out = []

    def leave_out(lines: list[Any]) -> None:
        left_out.append(lines[2]["rows"][5][1].pop())

    tamper(tmp_path, leave_out)
    problems = audit(tmp_path).epochs[0].problems
    assert len(problems) == 1, problems
    assert problems[0].startswith(f'example {left_out[0]} of "data" was given never, though it was due by step')


def test_a_step_or_row_that_is_missing_is_found(tmp_path: Path) -> None:
    run(samples(600), tmp_path, 8)

    def lose(lines: list[Any]) -> None:
        del lines[3]
        lines[5]["rows"].pop()

    tamper(tmp_path, lose)
    problems = audit(tmp_path).epochs[0].problems
    assert problems[:2] == ["step 3 is not in the ledger", "step 6 has 11 rows in the ledger, not 12"]


def test_pieces_of_a_document_are_told_apart(tmp_path: Path) -> None:
    data = build_dataset(write_rows(tmp_path / "rows.jsonl", 400), transform=encode_pieces)
    ledger = tmp_path / "ledger"
    run(data, ledger, drop_last=False)
    report = audit(ledger)
    assert report.ok, str(report)
    assert report.epochs[0].samples == sum(i % 4 for i in range(400))
    assert report.epochs[0].out == {"no sample in it": 100}

    def lose(lines: list[Any]) -> None:
        keys = next(keys for _, keys in lines[2]["rows"] if any(isinstance(key, list) for key in keys))
        keys.remove(next(key for key in keys if isinstance(key, list)))

    tamper(ledger, lose)
    assert any("was given only pieces" in problem for problem in audit(ledger).epochs[0].problems)


def write_mixture(folder: Path, stopping: str = "all_exhausted") -> str:
    for name, count, first in (("a", 230, 0), ("b", 50, 230)):
        write_rows(folder / f"{name}.jsonl", count, first)
    (folder / "mix.yaml").write_text(
        f"sources: [a.jsonl, b.jsonl]\nstopping: {stopping}\n"
        "schedule: [{schedule_type: const, weights: [0.5, 0.5]}]\n"
    )
    return str(folder / "mix.yaml")


@pytest.mark.parametrize("stopping", ["all_exhausted", "first_exhausted"])
@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_a_mixture_is_proven_pass_by_pass(tmp_path: Path, kind: Any, stopping: str) -> None:
    data = build_dataset(write_mixture(tmp_path, stopping), kind=kind, transform=encode)
    ledger = tmp_path / "ledger"
    made = run(data, ledger, drop_last=False)
    seen = Counter(n for step in made for n in step)
    assert (max(seen.values()) > 2) is (stopping == "all_exhausted")
    report = audit(ledger, data)
    assert report.ok, str(report)
    assert not report.epochs[0].unproven
    blind = audit(ledger)
    assert blind.ok
    assert bool(blind.epochs[0].unproven) is (kind == "iterable")

    def leave_out(lines: list[Any]) -> None:
        lines[1]["rows"][5][1].pop(0)

    tamper(ledger, leave_out)
    assert not audit(ledger, data).ok
    assert "WRONG: example" in str(audit(ledger, data))


def test_a_resumed_run_is_one_run_and_what_was_rolled_back_does_not_count(tmp_path: Path) -> None:
    data = samples(900)
    first, states = together(data, 2, 4, ledger=tmp_path)
    run_on, _ = together(data, 2, 5, states, ledger=tmp_path)  # rolled back to step 4 after this
    second, states = together(data, 3, 3, states, ledger=tmp_path)
    third, _ = together(data, 1, None, states, ledger=tmp_path)
    ledger = read_ledger(tmp_path)
    assert [(a.number, a.rank, a.ranks, a.first) for a in ledger.attempts] == [
        *((0, rank, 2, 1) for rank in range(2)),
        *((1, rank, 2, 5) for rank in range(2)),
        *((2, rank, 3, 5) for rank in range(3)),
        (3, 0, 1, 8),
    ]
    report = audit(tmp_path)
    assert report.ok, str(report)
    assert report.epochs[0].samples == sum(map(len, first + second + third))
    assert report.epochs[0].last == len(first + second + third)
    # both went on from step 4, so that they made the same
    assert run_on[:3] == second


def test_epochs_are_proven_each_for_itself(tmp_path: Path) -> None:
    each = loader(samples(400), ledger=tmp_path)
    steps = [len(list(each)), len(list(each))]
    next(iter(each))
    report = audit(tmp_path)
    assert report.ok, str(report)
    assert [(e.epoch, e.first, e.last, e.ended) for e in report.epochs] == [
        (0, 1, steps[0], True),
        (1, steps[0] + 1, sum(steps), True),
        (2, sum(steps) + 1, sum(steps) + 1, False),
    ]


def test_the_ledger_claims_no_step_that_was_not_given_and_has_all_that_a_state_has(tmp_path: Path) -> None:
    each = loader(samples(400), ledger=tmp_path)
    steps = iter(each)
    next(steps)
    assert read_ledger(tmp_path).attempts == []
    next(steps)
    assert audit(tmp_path).epochs[0].last == 1
    each.state_dict()
    assert audit(tmp_path).epochs[0].last == 2
    next(steps)
    steps.close()
    assert audit(tmp_path).epochs[0].last == 3


def test_a_line_that_was_torn_by_a_kill_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    run(samples(600), tmp_path, 6)
    (file,) = tmp_path.glob("*.gz")
    whole = file.read_bytes()
    for cut in range(20, len(whole), 97):
        file.write_bytes(whole[:cut])
        report = audit(tmp_path)
        assert report.ok, str(report)
        assert not report.epochs or report.epochs[0].last <= 6


def test_the_ledger_of_other_data_is_not_gone_on_with(tmp_path: Path) -> None:
    run(samples(600), tmp_path, 3)
    with pytest.raises(DataError, match="is the ledger of a run with seed=3, not seed=4: give another folder"):
        run(samples(600), tmp_path, 3, seed=4)
    with pytest.raises(DataError, match="the ledger of a run with sources="):
        run(samples(601), tmp_path, 3)
    with pytest.raises(DataError, match="holds no ledger"):
        audit(tmp_path / "nothing")


def test_the_description_of_the_data_is_kept(tmp_path: Path) -> None:
    run(samples(600), tmp_path / "run" / "ledger", 3, description={"path": "a.jsonl"})
    assert read_ledger(tmp_path / "run").manifest["description"] == {"path": "a.jsonl"}


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_a_ledger_takes_less_than_8_bytes_a_sample(tmp_path: Path, kind: Any) -> None:
    data: Any = [{"input_ids": [1] * (1 + i % 9), "labels": [1] * (1 + i % 9)} for i in range(60_000)]
    if kind == "iterable":
        path = write_rows(tmp_path / "rows.jsonl", 60_000, longest=9)
        data = build_dataset(path, kind="iterable", transform=encode)
    ledger = tmp_path / "ledger"
    each = loader(data, ledger=ledger, global_batch_size=64, buffer_size=50, micro_batch_size=8)
    given = sum(len(b["cu_seq_lens_q"]) - 1 for step in each for b in step)
    written = sum(file.stat().st_size for file in ledger.iterdir())
    assert given > 55_000
    assert written / given < 8


def random_picture(row: Any) -> Any:
    values = torch.rand((row["number"] % 3 + 1, 2), generator=torch.Generator().manual_seed(row["number"]))
    return encode(row) | {"pixel_values": values}


@pytest.mark.parametrize("kind", ["list", "mapping", "pieces", "iterable", "mixture", "unpacked", "long"])
def test_a_replayed_batch_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    path, transform = write_rows(tmp_path / "rows.jsonl", 500), partial(random_picture)
    kwargs: dict[str, Any] = {"micro_batch_size": 3, "drop_last": False}
    if kind == "list":
        data: Any = samples(500)
    elif kind == "pieces":
        data = build_dataset(path, transform=encode_pieces)
    elif kind == "mixture":
        data = build_dataset(write_mixture(tmp_path), transform=transform)
    else:
        data = build_dataset(path, kind="iterable" if kind == "iterable" else "mapping", transform=transform)
    if kind == "unpacked":
        kwargs |= {"packing": False}
    if kind == "long":
        data, kwargs = build_dataset(path, transform=encode), kwargs | {"max_seq_len": 20, "too_long": "split"}
    each = loader(data, ledger=tmp_path / "ledger", num_workers=1, **kwargs)
    made = [list(step) for step in each]
    made += [list(step) for _, step in zip(range(3), each, strict=False)]  # and some of a second epoch
    each.state_dict()
    for step in {1, 2, len(made) - 4, len(made) - 3, len(made) - 2, len(made)}:
        given = replay(data, tmp_path / "ledger", step)
        assert [plain(batch) for batch in given] == [plain(batch) for batch in made[step - 1]]
        assert [batch["input_ids"].dtype for batch in given] == [torch.int64] * len(given)
    with pytest.raises(DataError, match=rf"no step {len(made) + 1} of rank 0: it has 1 to {len(made)}$"):
        replay(data, tmp_path / "ledger", len(made) + 1)
    with pytest.raises(DataError, match="no steps of rank 3: its ranks are 0 to 0"):
        replay(data, tmp_path / "ledger", 1, 3)


def test_data_that_are_not_those_of_the_run_are_not_replayed(tmp_path: Path) -> None:
    run(samples(600), tmp_path, 3)
    with pytest.raises(DataError, match=r"the data are not those of .* data \(600 rows\) but these have data \(599"):
        replay(samples(599), tmp_path, 1)


def work(sample: Any) -> float:
    return len(sample["input_ids"]) + len(sample["input_ids"]) ** 2 / 8


def run_on_two_ranks(path: str, ledger: str) -> list[Any]:
    group, rank = dist.group.WORLD, dist.get_rank()
    kwargs = {"group": group, "ledger": ledger, "cost": work, "micro_batch_size": 2}
    data = build_dataset(path, transform=random_picture)
    each = loader(data, rank, 2, **kwargs)
    made = [step for _, step in zip(range(3), each, strict=False)]
    states: list[Any] = [None, None]
    dist.all_gather_object(states, each.state_dict())
    each = loader(data, rank, 2, **kwargs)
    each.load_state_dict(states)
    return [[plain(batch) for batch in step] for step in made + list(each)]


def test_ranks_write_one_ledger_from_which_each_is_replayed(tmp_path: Path, two_ranks: Ranks) -> None:
    path, ledger = write_rows(tmp_path / "rows.jsonl", 600), tmp_path / "run" / "ledger"
    ranks = two_ranks.run(run_on_two_ranks, path, str(ledger))
    data = build_dataset(path, transform=random_picture)
    report = audit(tmp_path / "run")
    assert report.ok, str(report)
    assert report.epochs[0].last == len(ranks[0])
    for rank in range(2):
        for step in (1, 3, 4, len(ranks[0])):
            given = replay(data, tmp_path / "run", step, rank)
            assert [plain(batch) for batch in given] == ranks[rank][step - 1]


@pytest.mark.parametrize("seed", range(4))
def test_no_resume_on_any_number_of_ranks_leaves_a_hole(tmp_path: Path, seed: int) -> None:
    data, rng, states = samples(700, seed=seed), random.Random(seed), None
    for ranks in (1, 2, 3, 4, 1):
        _, states = together(data, ranks, rng.randint(1, 3), states, ledger=tmp_path, drop_last=False)
    together(data, 2, None, states, ledger=tmp_path, drop_last=False)
    report = audit(tmp_path)
    assert report.ok, str(report)
    assert (report.epochs[0].samples, report.epochs[0].held) == (700, 0)
    assert ROWS * report.epochs[0].last > 100
