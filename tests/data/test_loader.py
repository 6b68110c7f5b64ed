from __future__ import annotations

import json
import os
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from veomni_data import DataError, PaddingCollator, build_dataloader, build_dataset, process_pretrain_example

ROWS = 12  # divisible by 1, 2, 3 and 4 ranks


def samples(count: int = 300, longest: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Sample i is token i + 1, some times."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    return [{"input_ids": [i + 1] * n, "labels": [i + 1] * n} for i, n in enumerate(lengths)]


def loader(data: Any, rank: int = 0, ranks: int = 1, **kwargs: Any) -> Any:
    kwargs = {"micro_batch_size": 1, "global_batch_size": ROWS, "max_seq_len": 64, "buffer_size": 8, "seed": 3} | kwargs
    return build_dataloader(data, dp_rank=rank, dp_size=ranks, **kwargs)


def numbers(micro_batches: list[dict[str, Any]]) -> list[int]:
    """The samples of these micro-batches, in order."""
    found = []
    for batch in micro_batches:
        for row in batch["input_ids"]:
            found += [int(t) - 1 for t in torch.unique_consecutive(row) if t]
    return found


def together(data: Any, ranks: int, steps: int | None = None, states: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """The samples of each step that all ranks make, and the states after it; each rank must make the same steps."""
    loaders = [loader(data, rank, ranks, **kwargs) for rank in range(ranks)]
    for each in loaders if states else ():
        each.load_state_dict(states)
    iterators = [iter(each) for each in loaders]
    made: list[list[int]] = []
    while steps is None or len(made) < steps:
        parts = [next(iterator, None) for iterator in iterators]
        if None in parts:
            assert parts == [None] * ranks
            break
        made.append([number for part in parts for number in numbers(part)])
    return made, [each.state_dict() for each in loaders]


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
    assert 0 <= len(kept) - len(dropped) <= 3
    assert len(together(samples(31), 1, packing=False)[0]) == 31 // ROWS
    assert len(together(samples(31), 1, packing=False, drop_last=False)[0]) == 3


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
    assert all(len(shard["buffer"]) < 8 for shard in state["shards"])


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
    held = [index for shard in state["shards"] for index, _ in shard["buffer"]]
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
    with pytest.raises(ValueError, match="the dataset, a generator, must have a length"):
        loader(iter_samples())
    with pytest.raises(DataError, match=r"sample \d+ of the dataset has no \"input_ids\" \(.'text'.\)"):
        next(iter(loader([{"text": "a"}] * 20)))


def iter_samples() -> Any:
    yield from samples()


@pytest.mark.parametrize("packing", [True, False])
def test_a_sample_longer_than_a_row_is_named(packing: bool) -> None:
    data = samples()
    data[7] = {"input_ids": [1] * 65, "labels": [1] * 65}
    with pytest.raises(DataError, match="sample 7 has 65 tokens: it must have 1 to max_seq_len=64"):
        list(loader(data, packing=packing))


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


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "worker"}


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
    with pytest.raises(DataError, match=r"^\S*rows\.jsonl:30: picture is broken$"):
        list(loader(data, num_workers=workers))


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
    each = loader(data, dist.get_rank(), dist.get_world_size(), drop_last=drop_last, group=group)
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
