from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_data import DataError, build_dataset

from tests.data.loading import ROWS, encode, loader, numbers, samples, write_rows

REASONS = ("missing file", "broken picture", "nothing to learn")


def encode_some(row: Any, every: int = 10) -> Any:
    """Every so manieth row is broken, for one of three reasons."""
    if row["number"] % every == 0:
        reason = REASONS[row["number"] // every % 3]
        raise DataError(f"this is a {reason}", reason=reason)
    return encode(row)


def encode_deadly(row: Any, how: str, number: int = 77) -> Any:
    if row["number"] == number:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "segfault":
            faulthandler.disable()  # pytest's would print where it was
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(60)
        raise KeyError("a bug")
    return encode(row)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_300_broken_samples_are_named_and_skipped_and_the_run_goes_on(tmp_path: Path, workers: int, kind: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 3000)
    lines = Path(path).read_text().splitlines()
    lines[15] = '{"number": 15, "len'
    Path(path).write_text("\n".join(lines))
    data = build_dataset(path, kind=kind, transform=encode_some)
    log = tmp_path / "run" / "skipped.jsonl"
    each = loader(data, num_workers=workers, max_skipped=0.2, skipped_path=log, drop_last=False)
    made = [number for step in each for number in numbers(step)]
    broken = {*range(0, 3000, 10), 15}
    assert Counter(made) == Counter(set(range(3000)) - broken)
    skipped = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(skipped) == 301
    assert {line["place"] for line in skipped} == {f"{path}:{number + 1}" for number in broken}
    for line in skipped:
        assert line["message"].startswith(line["place"])
        assert line.keys() == {"reason", "source", "place", "ref", "epoch", "step", "message"}
        assert line["source"] == "rows"
    assert Counter(line["reason"] for line in skipped) == {**dict.fromkeys(REASONS, 100), "bad row": 1}
    assert each.counts()["skipped"] == {"rows": {**dict.fromkeys(REASONS, 100), "bad row": 1}}
    assert each.counts()["seen"] == 3000


def test_a_run_with_too_many_broken_samples_stops_with_one_sentence(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 3000)
    log = tmp_path / "skipped.jsonl"
    each = loader(build_dataset(path, transform=encode_some), skipped_path=log)
    with pytest.raises(DataError) as raised:
        list(each)
    sentence = str(raised.value)
    assert "\n" not in sentence
    counted = each.counts()["skipped"]["rows"]
    skipped = sum(counted.values())
    assert 10 < skipped <= 24  # more than 1 % of 1,000, and what a step may bring
    assert f"{skipped} of the first {each.counts()['seen']} examples are broken" in sentence
    assert all(f"{reason} {number}" in sentence for reason, number in counted.items())
    assert f"more than max_skipped=0.01; each is named in {log}" in sentence
    assert len(log.read_text().splitlines()) == skipped


def test_few_broken_samples_at_the_beginning_do_not_stop_a_run(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 3000)
    list(loader(build_dataset(path, transform=partial(encode_some, every=300))))
    path = write_rows(tmp_path / "few.jsonl", 300)  # 2 of these are more than 1 % of 100, not of the epoch
    list(loader(build_dataset(path, transform=partial(encode_some, every=150))))


def test_an_epoch_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 300)
    data = build_dataset(path, transform=partial(encode_some, every=1))
    with pytest.raises(
        DataError, match=r"epoch 0 has too little for a step.*300 examples were seen, of which 300 are b"
    ):
        list(loader(data, max_skipped=1))
    long = [{"input_ids": [1] * 3, "labels": [1] * 3}] * 300
    with pytest.raises(DataError, match=r"epoch 0 has too little for a step .* 300 were dropped as longer than max"):
        list(loader(long, max_seq_len=2))


@pytest.mark.parametrize(
    ("sample", "what"),
    [
        ({"labels": [1]}, 'no "input_ids" but only'),
        ({"input_ids": [1, 2]}, 'no "labels" but only'),
        ({"input_ids": [1, 2], "labels": [1]}, '1 "labels" for 2 input_ids'),
        ({"input_ids": [], "labels": []}, "the sample has no token"),
        (None, "a NoneType is no sample"),
        ({"input_ids": None, "labels": None}, '"input_ids" of the sample is a NoneType'),
        ({"input_ids": "abc", "labels": "abc"}, '"input_ids" of the sample is a str'),
        ({"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 3)}, "has shape [1, 3]: it must have one axis"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "all labels are -100"),
        ({"input_ids": [1, 2], "labels": torch.tensor([-100, -100])}, "all labels are -100"),
    ],
)
def test_what_is_no_sample_is_skipped(sample: Any, what: str, tmp_path: Path) -> None:
    data = samples(300)
    data[9] = sample
    log = tmp_path / "skipped.jsonl"
    made = [n for step in loader(data, drop_last=False, skipped_path=log) for n in numbers(step)]
    assert sorted(made) == [n for n in range(300) if n != 9]
    (line,) = map(json.loads, log.read_text().splitlines())
    assert what in line["message"]
    assert line["place"] == "sample 9 of the dataset"


def encode_nothing(row: Any, how: str) -> Any:
    if how == "broken":
        raise DataError("it is broken")
    return [] if how == "none" else {"input_ids": [1] * 500, "labels": [1] * 500}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["broken", "none", "too long"])
def test_a_source_that_gives_nothing_is_not_read_for_ever(tmp_path: Path, how: str, workers: int) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 60)
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"sources: [{path}]\nstopping: forever\nschedule: [{{schedule_type: const, weights: [1]}}]\n")
    data = build_dataset(mix, transform=partial(encode_nothing, how=how))
    with pytest.raises(DataError, match="epoch 0 has too little for a step"):
        next(iter(loader(data, max_skipped=1, num_workers=workers)))


def encode_only(row: Any) -> Any:
    return encode(row) if row["number"] == 7 else []


def test_one_sample_among_many_that_are_left_out_is_found_by_every_row_again_and_again(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 60)
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"sources: [{path}]\nstopping: forever\nschedule: [{{schedule_type: const, weights: [1]}}]\n")
    each = loader(build_dataset(mix, transform=encode_only), packing=False)
    assert [numbers(step) for step, _ in zip(each, range(4), strict=False)] == [[7] * ROWS] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_in_a_transform_is_raised_with_its_sample(tmp_path: Path, workers: int) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 300)
    each = loader(build_dataset(path, transform=partial(encode_deadly, how="bug")), num_workers=workers)
    with pytest.raises(KeyError, match="a bug") as raised:
        list(each)
    assert any(f"{path}:78" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("how", "what"),
    [("killed", "was killed by SIGKILL"), ("segfault", "was killed by SIGSEGV"), ("exit", "ended with code 3")],
)
def test_a_worker_that_dies_is_reported_with_its_sample(tmp_path: Path, how: str, what: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 300)
    each = loader(build_dataset(path, transform=partial(encode_deadly, how=how)), num_workers=2)
    with pytest.raises(DataError, match=f"^a worker process {what} while it was at {path}:78$"):
        list(each)
    assert each._feeder._workers is None


def test_a_worker_that_hangs_is_given_up_after_its_time(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 300)
    data = build_dataset(path, transform=partial(encode_deadly, how="hang"))
    with pytest.raises(DataError, match=f"has answered within 2 s; they were at: {path}:78$"):
        list(loader(data, num_workers=1, worker_timeout=2))


def init(number: int) -> None:
    if number == 1:
        raise ValueError("no such device")


def test_a_worker_is_initialised_with_its_number(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 300)
    with pytest.raises(ValueError, match="no such device"):
        list(loader(build_dataset(path, transform=encode), num_workers=2, worker_init=init))


def test_workers_end_with_their_loader(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 300)
    each = loader(build_dataset(path, transform=encode), num_workers=2)
    steps = iter(each)
    next(steps)
    pids = [worker.process.pid for worker in each._feeder._workers._workers]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    del each, steps
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def fail_on_a_rank(path: str, log: str, how: str) -> tuple[str, int]:
    """The error of a rank and the steps before it. Only rank 1 has broken samples, or loses a worker."""
    transform: Any = partial(encode_deadly, how=how) if how != "broken" else partial(encode_some, every=1)
    data = build_dataset(path, transform=transform if how != "broken" or dist.get_rank() else encode)
    kwargs = {"num_workers": 1 if how == "killed" else 0, "skipped_path": log, "group": dist.group.WORLD}
    steps = 0
    try:
        for _ in loader(data, dist.get_rank(), 2, **kwargs):
            steps += 1
    except (DataError, KeyError) as error:
        return f"{type(error).__name__}: {error}", steps
    return "", steps


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("killed", "a worker process was killed by SIGKILL while it was at {path}:78"),
        ("bug", "KeyError: 'a bug' (while transforming {path}:78)"),
        ("broken", "of the first .* examples are broken"),
    ],
)
def test_what_stops_one_rank_stops_all_at_the_same_step(tmp_path: Path, two_ranks: Ranks, how: str, what: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 2400)
    log = tmp_path / "skipped.jsonl"
    (first, steps), (second, other_steps) = two_ranks.run(fail_on_a_rank, path, str(log), how)
    assert steps == other_steps
    if how == "bug":
        assert sorted([first, second]) == ["DataError: " + what.format(path=path), "KeyError: 'a bug'"]
    elif how == "killed":
        assert first == second == "DataError: " + what.format(path=path)
    else:
        # rank 1 has no sample that is whole: it did not read all its part before it asked
        assert first == second
        assert steps == 0
        assert 100 <= len(log.read_text().splitlines()) < 200


def uneven(row: Any) -> Any:
    return encode(row) | {"pixel_values": torch.zeros(1, 4 if row["number"] == 77 else 3)}


def collate_on_a_rank(path: str) -> tuple[str, int]:
    steps = 0
    try:
        for _ in loader(build_dataset(path, transform=uneven), dist.get_rank(), 2, group=dist.group.WORLD):
            steps += 1
    except DataError as error:
        return str(error), steps
    return "", steps


def test_samples_that_make_no_batch_stop_all_ranks_and_are_named(tmp_path: Path, two_ranks: Ranks) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 600)
    first, second = two_ranks.run(collate_on_a_rank, path)
    assert first == second
    assert '"pixel_values" of the samples of a micro-batch cannot be concatenated' in first[0]
    assert f"(micro-batch of {path}:" in first[0]


def test_a_broken_sample_that_was_held_back_is_skipped_on_resume(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 300)
    first = loader(build_dataset(path, transform=encode))
    steps = iter(first)
    made = [n for _ in range(3) for n in numbers(next(steps))]
    state = first.state_dict()
    gone = state["shards"][0]["held"][0][0]

    def transform(row: Any) -> Any:
        if row["number"] == gone:
            raise DataError("it is not there", reason="missing file")
        return encode(row)

    second = loader(build_dataset(path, transform=transform), drop_last=False)
    second.load_state_dict([state])
    made += [n for step in second for n in numbers(step)]
    assert Counter(made) == Counter(set(range(300)) - {gone})
    assert second.counts()["skipped"] == {"rows": {"missing file": 1}}
    assert len(made) > ROWS * 3
