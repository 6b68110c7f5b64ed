from __future__ import annotations

import json
import os
import random
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_data import DataError, PaddingCollator, build_dataset, process_pretrain_example

from tests.data.loading import (
    ROWS,
    encode_pieces,
    loader,
    numbers,
    plain,
    samples,
    together,
    write_rows,
)
from tests.data.loading import (
    encode as encode_plainly,
)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_every_sample_once(packing: bool) -> None:
    data = samples()
    for ranks in (1, 3):
        made, _ = together(data, ranks, drop_last=False, packing=packing)
        assert sorted(number for step in made for number in step) == list(range(len(data)))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_samples_of_a_step_do_not_depend_on_how_they_are_dealt(packing: bool, drop_last: bool) -> None:
    data = samples()
    kwargs = {"packing": packing, "drop_last": drop_last}
    alone, _ = together(data, 1, **kwargs)
    assert len(alone) > 5
    for ranks, micro_batch_size in ((1, 4), (1, 12), (2, 3), (3, 1), (4, 3)):
        assert together(data, ranks, micro_batch_size=micro_batch_size, **kwargs)[0] == alone
    padded, _ = together(data, 2, collate=PaddingCollator(), **kwargs)
    assert padded == alone


def test_a_step_is_made_of_full_micro_batches() -> None:
    for micro_batches in loader(samples(1000), ranks=2, micro_batch_size=3):
        assert len(micro_batches) == 2
        for batch in micro_batches:
            assert batch["input_ids"].shape[1] <= 3 * 64
    first = next(iter(loader(samples(1000), ranks=2, micro_batch_size=3)))
    assert sum(batch["input_ids"].shape[1] for batch in first) > 0.95 * 6 * 64
    unpacked = next(iter(loader(samples(1000), micro_batch_size=4, packing=False)))
    assert [batch["input_ids"].shape[0] for batch in unpacked] == [4, 4, 4]


def test_drop_last_ends_before_the_first_step_that_misses_a_row() -> None:
    data = samples()
    dropped, _ = together(data, 2)
    kept, _ = together(data, 2, drop_last=False)
    assert kept[: len(dropped)] == dropped
    assert len(kept) - len(dropped) == 1
    assert len(together(samples(31), 1, packing=False)[0]) == 31 // ROWS
    assert len(together(samples(31), 1, packing=False, drop_last=False)[0]) == 3


@pytest.mark.parametrize("ranks", [1, 3])
def test_drop_last_leaves_out_less_than_a_step_though_some_parts_are_much_longer(ranks: int) -> None:
    rng = random.Random(0)
    lengths = [rng.choice((8, 16, 40)) for _ in range(600)]
    data = [{"input_ids": [i + 1] * n, "labels": [i + 1] * n} for i, n in enumerate(lengths)]
    made, _ = together(data, ranks)
    tokens = [sum(len(data[number]["input_ids"]) for number in step) for step in made]
    assert sum(tokens) / len(tokens) > 0.9 * ROWS * 64
    missing = set(range(len(data))) - set(chain(*made))
    assert sum(len(data[number]["input_ids"]) for number in missing) < ROWS * 64
    assert len(list(chain(*made))) == len(data) - len(missing)


def test_a_rank_that_has_run_dry_makes_the_last_step_without_targets() -> None:
    made = [list(loader(samples(ROWS + 1), rank, 4, packing=False, drop_last=False)) for rank in range(4)]
    assert [len(steps) for steps in made] == [2, 2, 2, 2]
    assert sum(len(numbers(steps[1])) for steps in made) == 1
    assert [len(steps[1]) for steps in made] == [3, 3, 3, 3]
    assert all((batch["labels"] == -100).all() for steps in made[1:] for batch in steps[1])


def test_len_is_the_number_of_steps() -> None:
    for kwargs in ({}, {"drop_last": False}, {"packing": False}, {"packing": False, "drop_last": False}):
        each = loader(samples(), **kwargs)
        for _ in range(2):
            assert len(each) == len(list(each))


def test_each_iteration_is_the_next_epoch_and_set_epoch_chooses_one() -> None:
    data = samples()
    each = loader(data)
    epochs = [[numbers(step) for step in each] for _ in range(2)]
    assert epochs[0] != epochs[1]
    each.set_epoch(0)
    assert [numbers(step) for step in each] == epochs[0]
    next(iter(each))  # left after a step of epoch 1
    each.set_epoch(1)
    assert [numbers(step) for step in each] == epochs[1]
    next(iter(each))
    assert each.state_dict()["epoch"] == 2
    next(iter(each))
    assert each.state_dict()["epoch"] == 3
    assert numbers(next(iter(loader(data, seed=4)))) != epochs[0][0]


def test_an_iteration_that_another_has_replaced_does_not_go_on() -> None:
    each = loader(samples())
    first = iter(each)
    next(first)
    next(iter(each))
    with pytest.raises(RuntimeError, match="this iteration is over"):
        next(first)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_resume_on_other_ranks_makes_the_steps_that_would_have_come(packing: bool, seed: int) -> None:
    data, rng = samples(400, seed=seed), random.Random(seed)
    kwargs = {"drop_last": bool(seed % 2), "packing": packing}
    whole, _ = together(data, 1, **kwargs)
    made: list[list[int]] = []
    states = None
    for ranks in (1, 2, 3, 4, 1):
        steps, states = together(data, ranks, rng.randint(0, 2), json.loads(json.dumps(states)), **kwargs)
        made += steps
    made += together(data, 2, None, states, **kwargs)[0]
    assert made == whole
    if not kwargs["drop_last"]:
        assert Counter(number for step in made for number in step) == Counter(range(len(data)))


def test_a_resumed_batch_is_the_same_to_the_bit() -> None:
    data = [s | {"pixel_values": torch.rand(i % 3 + 1, 2)} for i, s in enumerate(samples())]
    first, second = loader(data, micro_batch_size=4), loader(data, micro_batch_size=4)
    steps = iter(first)
    for _ in range(3):
        next(steps)
    second.load_state_dict([first.state_dict()])
    assert len(second) == len(first)
    for expected, given in zip(next(steps), next(iter(second)), strict=True):
        assert expected.keys() == given.keys()
        assert all(torch.equal(torch.as_tensor(expected[key]), torch.as_tensor(given[key])) for key in expected)


def test_a_state_is_of_the_last_step_that_was_given_and_epochs_follow() -> None:
    data = samples()
    first = loader(data)
    steps = [numbers(step) for step in first]
    after = [numbers(step) for step in first]
    second = loader(data)
    assert first.state_dict()["epoch"] == 2
    ahead = iter(second)
    for _ in steps:
        next(ahead)
    third = loader(data)
    third.load_state_dict([second.state_dict()])  # all steps of epoch 0 are made, its end is not yet seen
    assert third.state_dict() == second.state_dict()
    third.set_epoch(0)
    assert list(third) == []
    assert [numbers(step) for step in third] == after


def test_a_loaded_epoch_is_not_begun_anew_by_its_set_epoch() -> None:
    data = samples()
    first = loader(data)
    steps = iter(first)
    next(steps)
    second = loader(data)
    second.load_state_dict([first.state_dict()])
    second.set_epoch(0)
    assert numbers(next(iter(second))) == numbers(next(steps))


def test_a_state_is_small_and_holds_only_what_is_held_back() -> None:
    each = loader(samples(3000), ranks=2)
    steps = iter(each)
    for _ in range(5):
        next(steps)
    state = each.state_dict()
    assert state == json.loads(json.dumps(state))
    assert len(state["shards"]) == ROWS // 2
    assert all(len(shard["held"]) < 8 for shard in state["shards"])


def test_only_what_was_held_back_is_encoded_again() -> None:
    read: list[int] = []

    class Counting(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    data = Counting(samples())
    first = loader(data)
    steps = iter(first)
    for _ in range(4):
        next(steps)
    state = first.state_dict()
    read.clear()
    expected = numbers(next(steps))
    new = list(read)
    second = loader(data)
    read.clear()
    second.load_state_dict([state])
    assert numbers(next(iter(second))) == expected
    held = [key[0] for shard in state["shards"] for key in shard["held"]]
    # sample 0 is also looked at to see what kind of dataset this is
    assert sorted(i for i in read if i) == sorted(i for i in held + new if i)


def test_states_that_do_not_fit_are_refused() -> None:
    data = samples()
    two = [loader(data, rank, 2) for rank in range(2)]
    states = [each.state_dict() for each in two]
    with pytest.raises(ValueError, match="list of the states of all ranks"):
        two[0].load_state_dict(states[0])
    with pytest.raises(ValueError, match=r"saved with global_batch_size=12 but is loaded with global_batch_size=24"):
        loader(data, global_batch_size=24).load_state_dict(states)
    with pytest.raises(ValueError, match="saved with seed=3 but is loaded with seed=5"):
        loader(data, seed=5).load_state_dict(states)
    with pytest.raises(ValueError, match="saved with samples=300 but is loaded with samples=299"):
        loader(data[1:]).load_state_dict(states)
    for wrong in (states[:1], [*states, states[0]]):
        with pytest.raises(ValueError, match="not each of the 12 once"):
            loader(data).load_state_dict(wrong)
    next(iter(two[0]))
    with pytest.raises(ValueError, match="not of one step: step is 1 and 0"):
        loader(data).load_state_dict([each.state_dict() for each in two])


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, None, 5, "state"])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(DataError, match=r"each state must be what state_dict\(\) of a loader gave"):
        loader(samples(50)).load_state_dict([state])


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"rank": 2, "ranks": 2}, "dp_rank=2 is not one of dp_size=2 ranks"),
        ({"ranks": 5}, r"global_batch_size=12 is not a multiple of dp_size \* micro_batch_size = 5 \* 1 = 5"),
        ({"micro_batch_size": 5}, r"= 1 \* 5 = 5"),
        ({"global_batch_size": 301}, "300 samples, too few for a step of global_batch_size=301 .drop_last=False"),
    ],
)
def test_sizes_that_cannot_be_are_named(kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        loader(samples(), **kwargs)


def test_a_dataset_that_cannot_be_loaded_is_named() -> None:
    with pytest.raises(ValueError, match="0 samples, too few"):
        loader([], drop_last=False)
    with pytest.raises(ValueError, match="the dataset, a int, must have a length and random access, or at least be"):
        loader(7)
    with pytest.raises(
        DataError, match=r"sample \d+ of the dataset: the sample has no \"input_ids\" but only .'text'."
    ):
        next(iter(loader([{"text": "a"}] * 20)))


def encode(row: Any, sleep: bool = False, broken: int = -1) -> Any:
    """A row as a sample with a picture; some take longer than others, so that workers do not keep step."""
    if row["number"] == broken:
        raise DataError("picture is broken")
    if sleep and row["number"] % 7 == 0:
        torch.rand(200, 200) @ torch.rand(200, 200)
    ids = torch.full((row["length"],), row["number"] + 1)
    bright = torch.full((1, 3), row["number"] / 2, dtype=torch.bfloat16)
    return {"input_ids": ids, "labels": ids, "pixel_values": bright, "worker": torch.tensor([os.getpid()])}


def rows(folder: Path, count: int = 300) -> str:
    lengths = [len(s["input_ids"]) for s in samples(count)]
    lines = [json.dumps({"number": i, "length": n}) for i, n in enumerate(lengths)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def test_workers_change_nothing_but_who_encodes(tmp_path: Path) -> None:
    data = build_dataset(rows(tmp_path), transform=partial(encode, sleep=True))
    alone, workers = loader(data, micro_batch_size=3), loader(data, micro_batch_size=3, num_workers=2)
    for _ in range(2):  # the same worker processes serve the second epoch
        pids = set()
        steps = iter(workers)
        for expected in alone:
            given = next(steps)
            assert [plain(batch) for batch in given] == [plain(batch) for batch in expected]
            assert given[0]["pixel_values"].dtype == torch.bfloat16
            assert workers.state_dict() == alone.state_dict()
            pids |= {int(pid) for batch in given for pid in batch["worker"]}
        assert next(steps, None) is None
        assert len(pids) == 2
        assert os.getpid() not in pids
    assert workers.state_dict() == alone.state_dict()


def test_workers_resume_where_a_state_without_workers_was_saved(tmp_path: Path) -> None:
    data = build_dataset(rows(tmp_path), transform=encode)
    first = loader(data)
    steps = iter(first)
    for _ in range(3):
        next(steps)
    second = loader(data, num_workers=2, prefetch_factor=5)
    next(iter(second))  # left behind, with samples on their way
    second.load_state_dict([first.state_dict()])
    assert [numbers(step) for step in second] == [numbers(step) for step in steps]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_error_is_one_sentence_wherever_it_happens(tmp_path: Path, workers: int) -> None:
    data = build_dataset(rows(tmp_path), transform=partial(encode, broken=29))
    each = loader(data, num_workers=workers, max_skipped=0)
    with pytest.raises(DataError, match=r"^\S*rows\.jsonl:30: picture is broken$"):
        list(each)
    with pytest.raises(DataError, match="failed in the midst of a step"):
        each.state_dict()


def test_a_document_of_many_pieces_is_resumed_in_its_middle(tokenizer: Any) -> None:
    class Documents:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            # document 3 is empty, the others are longer than many rows
            text = "" if index == 3 else f"{index} Hello there world. " * (40 + index)
            return process_pretrain_example({"text": text}, tokenizer, max_seq_len=16)

    def tokens(steps: Any) -> list[list[int]]:
        return [batch["input_ids"][0].tolist() for step in steps for batch in step]

    kwargs = {"global_batch_size": 2, "max_seq_len": 16, "drop_last": False, "buffer_size": 3}
    whole = tokens(loader(Documents(), **kwargs))
    made, each = [], loader(Documents(), **kwargs)
    for steps in (1, 2, 3, 5, 8):
        iterator = iter(each)
        made += tokens(next(iterator) for _ in range(steps))
        state = json.loads(json.dumps(each.state_dict()))
        each = loader(Documents(), **kwargs)
        each.load_state_dict([state])
    assert made + tokens(each) == whole
    expected = sorted(int(t) for i in range(6) for piece in Documents()[i] for t in piece["input_ids"])
    assert sorted(t for row in whole for t in row if row != [0, 0, 0, 0]) == expected


def steps_of_a_rank(path: str, drop_last: bool, broken: int) -> Any:
    group = dist.group.WORLD
    data = build_dataset(path, transform=partial(encode, broken=broken))
    each = loader(data, dist.get_rank(), dist.get_world_size(), drop_last=drop_last, group=group, max_skipped=0)
    try:
        return [numbers(step) for step in each]
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_agree_on_the_last_step(tmp_path: Path, two_ranks: Ranks, drop_last: bool) -> None:
    path = rows(tmp_path, 150)
    first, second = two_ranks.run(steps_of_a_rank, path, drop_last, -1)
    together_ = [a + b for a, b in zip(first, second, strict=True)]
    assert together_ == together(samples(150), 1, drop_last=drop_last)[0]


def test_a_data_error_on_one_rank_is_raised_on_all(tmp_path: Path, two_ranks: Ranks) -> None:
    path = rows(tmp_path, 150)
    for answer in two_ranks.run(steps_of_a_rank, path, True, 29):
        assert answer == f"{path}:30: picture is broken"


def test_ranks_that_cannot_know_the_end_need_a_group(tmp_path: Path) -> None:
    data = build_dataset(rows(tmp_path), transform=encode)
    with pytest.raises(ValueError, match="give `group`, a process group over the data-parallel ranks"):
        loader(data, 0, 2)
    with pytest.raises(TypeError, match="not known"):
        len(loader(data))


def open_data(kind: str, folder: str) -> Any:
    """Data of each kind, over the same rows: 400 samples, or 480 drawn from two sources."""
    if kind == "list":
        return samples(400)
    if kind == "pieces":
        return build_dataset(f"{folder}/all.jsonl", transform=encode_pieces)
    if kind == "stream":
        return build_dataset(f"{folder}/[abc].jsonl", kind="iterable", transform=encode_plainly, shuffle_buffer=16)
    if kind == "mixed stream":
        return build_dataset(f"{folder}/mix.yaml", kind="iterable", transform=encode_plainly, shuffle_buffer=4)
    return build_dataset(f"{folder}/mix.yaml", transform=encode_plainly)


def write_data(folder: Path) -> str:
    write_rows(folder / "all.jsonl", 400)
    for name, count, first in (("a", 230, 0), ("b", 50, 230), ("c", 120, 280)):
        write_rows(folder / f"{name}.jsonl", count, first)
    (folder / "mix.yaml").write_text(
        "sources: [a.jsonl, b.jsonl, c.jsonl]\nstopping: all_exhausted\nschedule:\n"
        "  - {schedule_type: const, weights: [0.5, 0.2, 0.3], steps: 3}\n"
        "  - {schedule_type: linear, weights: [0.2, 0.2, 0.6], steps: 6}\n"
    )
    return str(folder)


def run_steps(data: Any, groups: Any, world: int, states: Any, limit: int | None, **kwargs: Any) -> tuple[Any, Any]:
    """The samples of each step on so many of the ranks, and their states after it."""
    steps: list[list[int]] = []
    state = None
    if dist.get_rank() < world:
        each = loader(data, dist.get_rank(), world, group=groups[world], **kwargs)
        if states:
            each.load_state_dict(states)
        for step in each if limit != 0 else ():
            steps.append(numbers(step))
            if len(steps) == limit:
                break
        state = each.state_dict()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (steps, state))
    made = [list(chain(*parts)) for parts in zip(*(steps for steps, _ in everywhere[:world]), strict=True)]
    return made, json.loads(json.dumps([state for _, state in everywhere[:world]]))


def resume_often(kind: str, folder: str, seeds: int) -> list[Any]:
    """For each seed the steps of an epoch that is not interrupted, and of one on 1, 2, 3, 4 and 1 ranks in turn."""
    groups = {n: dist.new_group(list(range(n))) for n in range(1, 5)}
    data, found = open_data(kind, folder), []
    for seed in range(seeds):
        kwargs = {"seed": seed, "drop_last": False, "max_seq_len": 64, "buffer_size": 1 + 5 * (seed % 4)}
        whole, _ = run_steps(data, groups, 1, None, None, **kwargs)
        cuts = sorted(random.Random(seed).choices(range(len(whole)), k=4))
        made, states = [], None
        for world, first, last in zip((1, 2, 3, 4, 1), (0, *cuts), (*cuts, None), strict=True):
            steps, states = run_steps(data, groups, world, states, None if last is None else last - first, **kwargs)
            made += steps
        found.append((whole, made))
    return found


@pytest.mark.parametrize("seeds", [6, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
@pytest.mark.parametrize("kind", ["list", "pieces", "stream", "mixture", "mixed stream"])
def test_a_run_that_is_resumed_on_other_ranks_makes_the_same_steps(
    tmp_path: Path, four_ranks: Ranks, kind: str, seeds: int
) -> None:
    folder = write_data(tmp_path)
    everything = range(400) if kind != "pieces" else [3 * i + piece for i in range(400) for piece in range(i % 4)]
    for whole, made in four_ranks.run(resume_often, kind, folder, seeds, timeout=seeds * 5)[0]:
        assert made == whole
        seen = Counter(number for step in made for number in step)
        if "mix" in kind:  # some are read again before all were read once
            assert set(seen) == set(everything)
            assert max(seen.values()) > 1
        else:
            assert seen == Counter(everything)


def write_mixture(folder: Path, stopping: str, weights: str, counts: tuple[int, int] = (300, 100)) -> str:
    write_rows(folder / "a.jsonl", counts[0], 0)
    write_rows(folder / "b.jsonl", counts[1], 1000)
    path = folder / "mix.yaml"
    path.write_text(f"sources: [a.jsonl, b.jsonl]\nstopping: {stopping}\nschedule: [{weights}]\n")
    return str(path)


CONST = "{schedule_type: const, weights: [0.25, 0.75]}"


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_sources_are_drawn_by_their_weights_and_begin_anew(tmp_path: Path, kind: str) -> None:
    data = build_dataset(write_mixture(tmp_path, "forever", CONST), kind=kind, transform=encode_plainly)
    each = loader(data)
    made = [numbers(step) for _, step in zip(range(60), each, strict=False)]
    seen = Counter(number for step in made for number in step)
    of_b = sum(n for number, n in seen.items() if number >= 1000)
    assert of_b / seen.total() == pytest.approx(0.75, abs=0.03)
    counted = each.counts()
    assert counted["samples"] == {"a": seen.total() - of_b, "b": of_b}
    assert counted["tokens"]["a"] + counted["tokens"]["b"] > 0.9 * 60 * ROWS * 64
    assert seen[1000] > 10
    # 100 rows in 12 parts: one that is read 17 times while another is read 16 times may differ by a pass
    times = [seen[1000 + i] for i in range(100)]
    assert max(times) - min(times) < 8


def test_weights_that_change_follow_the_steps_of_the_run(tmp_path: Path) -> None:
    schedule = (
        "{schedule_type: const, weights: [1, 0], steps: 3}, {schedule_type: const, weights: [0, 1], steps: 3},"
        "{schedule_type: const, weights: [1, 0]}"
    )
    data = build_dataset(write_mixture(tmp_path, "forever", schedule), transform=encode_plainly)
    # what a row is made of was drawn before it: of one sample each, it is that of its step
    made = [numbers(step) for _, step in zip(range(8), loader(data, packing=False), strict=False)]
    assert [{number >= 1000 for number in step} for step in made] == [{False}] * 3 + [{True}] * 3 + [{False}] * 2
    each = loader(data, packing=False)
    for _ in range(2):
        next(iter(each))  # two epochs are begun and left after a step
    assert [{n >= 1000 for n in numbers(step)} for _, step in zip(range(2), each, strict=False)] == [{False}, {True}]


def test_a_source_smaller_than_a_step_is_read_by_all_rows_in_turn(tmp_path: Path) -> None:
    path = write_mixture(tmp_path, "forever", CONST, (300, 5))
    data = build_dataset(path, transform=encode_plainly)
    seen = Counter(n for _, step in zip(range(40), loader(data), strict=False) for n in numbers(step))
    times = [seen[1000 + i] for i in range(5)]
    assert sum(times) / seen.total() == pytest.approx(0.75, abs=0.03)
    assert max(times) - min(times) < 0.1 * max(times)
    path = write_mixture(tmp_path, "first_exhausted", CONST, (300, 5))
    with pytest.raises(DataError, match='the source "b" has 5 samples, not one for each of the global_batch_size=12'):
        loader(build_dataset(path, transform=encode_plainly))


def test_sources_without_a_schedule_are_read_once_and_spread_over_the_epoch(tmp_path: Path) -> None:
    for name, count, first in (("a", 300, 0), ("b", 100, 300)):
        write_rows(tmp_path / f"{name}.jsonl", count, first)
    (tmp_path / "mix.yaml").write_text("sources: [a.jsonl, b.jsonl]\n")
    for kind in ("mapping", "iterable"):
        data = build_dataset(tmp_path / "mix.yaml", kind=kind, transform=encode_plainly)
        made, _ = together(data, 1, drop_last=False)
        assert Counter(number for step in made for number in step) == Counter(range(400))
        half = [number for step in made[: len(made) // 2] for number in step]
        assert sum(number >= 300 for number in half) / len(half) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("kind", ["stream", "mixture", "mixed stream", "pieces"])
def test_workers_and_what_they_are_ahead_change_nothing(tmp_path: Path, kind: str) -> None:
    folder = write_data(tmp_path)

    def steps(**kwargs: Any) -> tuple[list[Any], Any]:
        each = loader(open_data(kind, folder), drop_last=False, **kwargs)
        return [[plain(batch) for batch in step] for step in each], each.counts()

    alone = steps()
    assert len(alone[0]) > 5
    for workers, ahead in ((1, 1), (3, 2), (2, 40)):
        assert steps(num_workers=workers, prefetch_factor=ahead) == alone


class Walked:
    """An iterable that is no sequence, whose order is that of the epoch."""

    epoch = 0

    def __iter__(self) -> Any:
        order = list(range(400))
        random.Random(self.epoch).shuffle(order)
        every = samples(400)
        return iter([every[i] for i in order])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def walk_on_two_ranks() -> Any:
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2)}
    whole, _ = run_steps(Walked(), groups, 1, None, None, drop_last=False)
    first, states = run_steps(Walked(), groups, 2, None, 4, drop_last=False)
    second, states = run_steps(Walked(), groups, 1, states, 3, drop_last=False)
    return whole, first + second + run_steps(Walked(), groups, 2, states, None, drop_last=False)[0]


def test_any_iterable_is_loaded_and_resumed_by_walking_it_again(two_ranks: Ranks) -> None:
    whole, resumed = two_ranks.run(walk_on_two_ranks)[0]
    assert resumed == whole
    assert Counter(number for step in whole for number in step) == Counter(range(400))
    each = loader(Walked(), drop_last=False)
    epochs = [[numbers(step) for step in each] for _ in range(2)]
    assert epochs[0] == whole
    assert epochs[1] != whole
    assert sorted(chain(*epochs[1])) == list(range(400))


def test_an_iterator_gives_one_epoch(tmp_path: Path) -> None:
    each = loader(iter(samples()), drop_last=False)
    assert sorted(chain(*map(numbers, each))) == list(range(300))
    with pytest.raises(DataError, match="epoch 1 has too little for a step"):
        next(iter(each))


def test_a_row_begins_with_the_oldest_sample_and_keeps_to_the_budget_of_its_step() -> None:
    data = samples(2000)
    each = loader(data, budget=lambda step: 16 + 8 * step, drop_last=False)
    lengths = {i: len(s["input_ids"]) for i, s in enumerate(data)}
    seen: list[int] = []
    for step, micro_batches in enumerate(each):
        for batch in micro_batches:
            tokens, row = batch["input_ids"].shape[1], numbers([batch])
            assert tokens <= max(min(16 + 8 * step, 64), lengths[row[0]] if row else 4)
            seen += row
    assert Counter(seen) == Counter(range(2000))
    full = [batch["input_ids"].shape[1] for step in loader(data) for batch in step]
    assert sum(full) / len(full) > 60


def test_a_budget_follows_the_steps_of_a_resumed_run() -> None:
    data = samples(1000)
    kwargs: dict[str, Any] = {"budget": lambda step: 16 + 8 * step, "drop_last": False}
    whole, _ = together(data, 1, **kwargs)
    first, states = together(data, 1, 4, **kwargs)
    assert first + together(data, 3, None, states, **kwargs)[0] == whole


def test_rows_hold_so_many_targets_and_no_more_than_so_many_tokens() -> None:
    data = samples(2000)
    for i, sample in enumerate(data):  # a fifth to all of it is learnt
        learnt = max(1, len(sample["labels"]) * (i % 5 + 1) // 5)
        sample["labels"] = [-100] * (len(sample["labels"]) - learnt) + sample["labels"][:learnt]
    batches = [batch for step in loader(data, count="targets") for batch in step]
    targets = [int((batch["shift_labels"] != -100).sum()) for batch in batches]
    tokens = [batch["input_ids"].shape[1] for batch in batches]
    assert max(targets) <= 64
    assert max(tokens) <= 96
    assert sum(targets) / len(targets) > 48
    batches = [batch for step in loader(data, count="targets", max_row_tokens=300) for batch in step]
    assert sum(int((b["shift_labels"] != -100).sum()) for b in batches) / len(batches) > 60
    assert max(batch["input_ids"].shape[1] for batch in batches) > 96


def work(sample: Any) -> float:
    length = len(sample["input_ids"])
    return length + length * length / 8


def steps_by_cost(balanced: bool) -> Any:
    data = build_samples_with_pictures()
    each = loader(
        data,
        dist.get_rank(),
        dist.get_world_size(),
        cost=work if balanced else None,
        group=dist.group.WORLD,
        micro_batch_size=3,
    )
    steps = []
    for micro_batches in each:
        costs = [work({"input_ids": range(n)}) for b in micro_batches for n in b["cu_seq_lens_q"].diff().tolist()]
        pictures = [value for batch in micro_batches for value in batch["pixel_values"].float().mean(1).tolist()]
        steps.append((numbers(micro_batches), sum(costs), pictures, len(micro_batches)))
    return steps


def build_samples_with_pictures() -> list[dict[str, Any]]:
    return [s | {"pixel_values": torch.full((1, 3), i / 2, dtype=torch.bfloat16)} for i, s in enumerate(samples(600))]


def test_rows_of_a_step_are_dealt_to_ranks_by_their_cost(four_ranks: Ranks) -> None:
    slowest = {}
    for balanced in (False, True):
        ranks = four_ranks.run(steps_by_cost, balanced)
        worst = []
        for step in zip(*ranks, strict=True):
            costs = [cost for _, cost, _, _ in step]
            worst.append(max(costs) / (sum(costs) / 4))
            assert [micro_batches for *_, micro_batches in step] == [1, 1, 1, 1]
            for made, _, pictures, _ in step:  # the tensors came along
                assert pictures == pytest.approx([number / 2 for number in made], rel=0.01)
        slowest[balanced] = sum(worst) / len(worst)
        seen = Counter(number for rank in ranks for made, *_ in rank for number in made)
        assert max(seen.values()) == 1
        alone = loader(build_samples_with_pictures(), cost=work if balanced else None)
        expected = [sorted(numbers(step)) for step in alone]
        assert [sorted(chain(*(made for made, *_ in step))) for step in zip(*ranks, strict=True)] == expected
        assert len(loader(build_samples_with_pictures(), cost=work if balanced else None)) == len(expected)
    assert slowest[True] < 1.02 < slowest[False]


def test_a_run_by_cost_is_resumed_with_the_same_steps() -> None:
    data = samples(600)
    whole, _ = together(data, 1, cost=work, drop_last=False)
    first, states = together(data, 1, 5, cost=work, drop_last=False)
    assert first + together(data, 1, None, json.loads(json.dumps(states)), cost=work, drop_last=False)[0] == whole
    with pytest.raises(DataError, match="ranks deal their rows by cost through `group`"):
        loader(data, 0, 2, cost=work)


def test_counts_go_on_after_a_resume_on_other_ranks() -> None:
    data = samples(600)
    first = [loader(data, rank, 2) for rank in range(2)]
    steps = [iter(each) for each in first]
    for _ in range(3):
        for step in steps:
            next(step)
    second = [loader(data, rank, 3) for rank in range(3)]
    for each in second:
        each.load_state_dict([each.state_dict() for each in first])

    def total(loaders: Any) -> Counter[str]:
        return sum((Counter(each.counts()["tokens"]) for each in loaders), Counter())

    assert total(second) == total(first)
    assert total(first)["data"] > 0.95 * 3 * ROWS * 64
    tokens = sum(batch["input_ids"].numel() for each in second for step in each for batch in step)
    assert total(second)["data"] == total(first)["data"] + tokens


def test_a_state_of_many_rows_is_small() -> None:
    data = [{"input_ids": [1] * (20 + i % 50), "labels": [1] * (20 + i % 50)} for i in range(40_000)]
    each = loader(data, global_batch_size=64, buffer_size=200, max_seq_len=512, micro_batch_size=8)
    steps = iter(each)
    for _ in range(3):
        next(steps)
    assert sum(len(shard["held"]) for shard in each.state_dict()["shards"]) > 64 * 150
    assert len(json.dumps(each.state_dict())) < 150_000


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"buffer_size": 0}, "buffer_size=0 must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"prefetch_factor": 0}, "prefetch_factor=0 must be at least 1"),
        ({"worker_timeout": 0}, "worker_timeout=0 must be"),
        ({"too_long": "cut"}, 'too_long="cut" is not one of drop, truncate, split'),
        ({"count": "words"}, 'count="words" is not one of tokens, targets'),
        ({"max_skipped": 2}, "max_skipped=2 is not a share from 0 to 1"),
        ({"packing": False, "count": "targets"}, "without packing a row is one sample"),
        ({"max_row_tokens": 90}, 'max_row_tokens=90 is at least max_seq_len=64, and for count="targets"'),
        ({"description": {}}, "a description is kept in the ledger"),
    ],
)
def test_options_that_have_no_meaning_are_named(kwargs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        loader(samples(), **kwargs)


@pytest.mark.gpu
def test_pinned_batches_lie_in_page_locked_memory() -> None:
    batch = next(iter(loader(samples(), pin_memory=True)))[0]
    assert all(value.is_pinned() for value in batch.values() if isinstance(value, torch.Tensor))


def test_pinning_without_an_accelerator_is_not_an_error() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    batch = next(iter(loader(samples(), pin_memory=True)))[0]
    assert not batch["input_ids"].is_pinned()
