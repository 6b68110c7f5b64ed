from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from veomni_data import DataError, build_dataloader, build_dataset, read_ledger
from veomni_data.multisource import Interleaved, Mixture, Phase, choose

SCHEDULE = "schedule:\n  - schedule_type: const\n    weights: [0.25, 0.75]\n"


def write(path: Path, count: int, key: str = "text") -> None:
    path.write_text("".join(json.dumps({key: f"{path.stem}{i}"}) + "\n" for i in range(count)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "a.jsonl", 300)
    write(tmp_path / "b.jsonl", 100)
    return tmp_path


def mix(folder: Path, rest: str = SCHEDULE, sources: str = "[a.jsonl, b.jsonl]") -> Path:
    path = folder / "mix.yaml"
    path.write_text(f"sources: {sources}\nnames: [a, b]\n{rest}")
    return path


def interleaved(dataset: Any, limit: int = 10**6, **place: Any) -> list[str]:
    rows = Interleaved(dataset.sources, dataset.mixture, **{"seed": 0, "epoch": 0, **place})
    return [row["text"] for row, _ in zip(rows, range(limit), strict=False)]


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_rows_are_drawn_by_weight_and_say_from_where(folder: Path, kind: str) -> None:
    dataset = build_dataset(mix(folder), kind=kind, seed=1)
    rows = list(dataset)
    assert Counter(row.source for row in rows)["b"] / len(rows) == pytest.approx(0.75, abs=0.1)
    assert all(row.source == row["text"][0] for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_the_order_is_a_function_of_seed_and_epoch(folder: Path, kind: str) -> None:
    def order(seed: int, epoch: int) -> tuple[str, ...]:
        dataset = build_dataset(mix(folder), kind=kind, seed=seed)
        dataset.set_epoch(epoch)
        return tuple(row["text"] for row in dataset)

    assert order(0, 0) == order(0, 0)
    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3


def test_a_mapping_of_several_sources_has_all_rows_one_after_the_other(folder: Path) -> None:
    dataset = build_dataset(mix(folder))
    assert len(dataset) == 400
    assert (dataset[0]["text"], dataset[299]["text"], dataset[300]["text"], dataset[-1]["text"]) == (
        "a0", "a299", "b0", "b99",
    )  # fmt: skip
    assert dataset[300].source == "b"


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_without_a_schedule_every_row_comes_once(folder: Path, kind: str) -> None:
    rows = [row["text"] for row in build_dataset(mix(folder, ""), kind=kind)]
    assert sorted(rows) == sorted([f"a{i}" for i in range(300)] + [f"b{i}" for i in range(100)])


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_first_exhausted_ends_when_a_source_has_no_more(folder: Path, kind: str) -> None:
    rows = interleaved(build_dataset(mix(folder), kind=kind))
    assert len({row for row in rows if row[0] == "b"}) == 100
    assert max(Counter(rows).values()) == 1


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_all_exhausted_repeats_the_short_newly_shuffled_until_the_long_is_read(folder: Path, kind: str) -> None:
    rows = interleaved(build_dataset(mix(folder, SCHEDULE + "stopping: all_exhausted\n"), kind=kind))
    counts = Counter(rows)
    assert {counts[f"a{i}"] for i in range(300)} == {1}
    of_b = [row for row in rows if row[0] == "b"]
    assert len(of_b) > 700
    assert max(counts[f"b{i}"] for i in range(100)) - min(counts[f"b{i}"] for i in range(100)) <= 1
    assert of_b[:100] != of_b[100:200]
    assert sorted(of_b[:100]) == sorted(of_b[100:200])


def test_forever_never_ends(folder: Path) -> None:
    dataset = build_dataset(mix(folder, SCHEDULE + "stopping: forever\n"), kind="iterable")
    assert len(interleaved(dataset, 3000)) == 3000


def test_a_source_without_a_weight_does_not_keep_the_epoch_from_ending(folder: Path) -> None:
    never = SCHEDULE.replace("[0.25, 0.75]", "[1, 0]") + "stopping: all_exhausted\n"
    assert sorted(interleaved(build_dataset(mix(folder, never)))) == sorted(f"a{i}" for i in range(300))


def test_a_source_that_has_nothing_in_a_part_is_left_to_the_others(folder: Path) -> None:
    write(folder / "b.jsonl", 2)
    for stopping in ("all_exhausted", "forever"):
        dataset = build_dataset(mix(folder, SCHEDULE + f"stopping: {stopping}\n"))
        drawn = [interleaved(dataset, 100, number=number, parts=5) for number in range(5)]
        assert sum(any(row[0] == "b" for row in rows) for rows in drawn) == 2
        assert all(any(row[0] == "a" for row in rows) for rows in drawn)


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted", "forever"])
@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_an_interleaved_iteration_goes_on_from_any_state(folder: Path, kind: str, stopping: str) -> None:
    dataset = build_dataset(mix(folder, SCHEDULE + f"stopping: {stopping}\n"), kind=kind)
    place: dict[str, Any] = {"number": 1, "parts": 3, "seed": 0, "epoch": 4}
    whole = interleaved(dataset, 400, **place)
    for steps in (0, 1, 20, len(whole) // 2, len(whole)):
        rows = Interleaved(dataset.sources, dataset.mixture, **place)
        for _ in range(steps):
            next(rows)
        state = json.loads(json.dumps(rows.state_dict()))
        assert interleaved(dataset, 400 - steps, **place, state=state) == whole[steps:]


def test_workers_share_a_mixture(folder: Path) -> None:
    dataset = build_dataset(mix(folder, ""), kind="iterable")
    rows = [row["text"] for row in DataLoader(dataset, batch_size=None, num_workers=2)]
    assert (len(rows), len(set(rows))) == (400, 400)


def test_weights_change_over_steps() -> None:
    mixture = Mixture(
        ("a", "b"),
        (
            Phase("const", (1.0, 0.0), 10),
            Phase("linear", (0.5, 0.5), 10),
            Phase("const", (0.2, 0.8), 5),
            Phase("linear", (0.0, 1.0), 4),
        ),
    )
    expected = {0: 1.0, 9: 1.0, 10: 1.0, 15: 0.75, 19: 0.55, 20: 0.2, 24: 0.2, 25: 0.2, 27: 0.1, 29: 0.0, 1000: 0.0}
    for step, weight in expected.items():
        assert mixture.weights(step) == pytest.approx((weight, 1 - weight))
    assert [mixture.drawable(step) for step in (0, 10, 28, 29)] == [[True, True]] * 3 + [[False, True]]


def test_a_schedule_moves_what_is_drawn(folder: Path) -> None:
    write(folder / "b.jsonl", 300)
    schedule = (
        "schedule:\n  - {schedule_type: const, weights: [1, 0], steps: 50}\n"
        "  - {schedule_type: linear, weights: [0, 1], steps: 100}\n"
    )
    drawn = "".join(row[0] for row in interleaved(build_dataset(mix(folder, schedule))))
    assert drawn[:50] == "a" * 50
    assert 0.3 < drawn[50:150].count("b") / 100 < 0.7
    assert set(drawn[150:]) == {"b"}


def test_choosing_follows_the_weights_and_never_takes_one_of_zero() -> None:
    weights = (0.0, 0.3, 0.0, 0.7, 0.0)
    chosen = Counter(choose(weights, i / 1000) for i in range(1000))
    assert chosen == {1: 300, 3: 700}
    assert choose(weights, 1 - 1e-17) == 3
    assert choose((0.0, 0.0), 0.5) is None


def test_columns_of_a_source_are_given_our_names(folder: Path) -> None:
    write(folder / "b.jsonl", 3, "body")
    (folder / "c.jsonl").write_text('{"data": {"deep": "c0"}, "n": 1}\n')
    (folder / "mix.yml").write_text(
        "sources:\n  - path: b.jsonl\n    columns: {text: body}\n  - {path: c.jsonl, columns: {text: data.deep}}\n"
    )
    assert list(build_dataset(folder / "mix.yml"))[2:] == [{"text": "b2"}, {"text": "c0", "n": 1}]
    (folder / "mix.yml").write_text("sources:\n  - path: b.jsonl\n    columns: {text: bdoy}\n")
    for kind in ("mapping", "iterable"):
        with pytest.raises(DataError, match=r'b\.jsonl:1: there is no column "bdoy": there are body') as error:
            next(iter(build_dataset(folder / "mix.yml", kind=kind, shuffle_buffer=0)))
        assert error.value.reason == "bad row"


def test_columns_of_a_source_rename_the_keys_of_its_turns(folder: Path) -> None:
    row = {"dialog": [{"speaker": "user", "words": "hi", "n": 1}], "n": 2}
    (folder / "d.jsonl").write_text(json.dumps(row) + "\n")
    columns = "{messages: dialog, role: speaker, content: words}"
    (folder / "mix.yml").write_text(f"sources:\n  - {{path: d.jsonl, columns: {columns}}}\n")
    assert list(build_dataset(folder / "mix.yml")) == [
        {"messages": [{"role": "user", "content": "hi", "n": 1}], "n": 2}
    ]


def test_paths_start_from_the_folder_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for sources in ("[a.jsonl, b.jsonl]", '["a.json*, b.jsonl", b.jsonl]', f"[{folder}/a.jsonl, ./b.jsonl]"):
        assert len(build_dataset(mix(folder, "", sources))) in (400, 500)
    (folder / "configs").mkdir()
    path = mix(folder, "")
    monkeypatch.chdir(folder)
    assert len(build_dataset(path.rename(folder / "configs" / "mix.yaml"))) == 400


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"mix\.yaml is empty"),
        ("sources: [a.jsonl", r"mix\.yaml:1: this is not YAML"),
        ("- a.jsonl", r"mix\.yaml:1: a mapping of sources, names, schedule, stopping is expected"),
        ("names: [a]", r"mix\.yaml:1: sources: a list of paths is missing"),
        ("sources: a.jsonl", r"mix\.yaml:1: sources: a list is expected"),
        ("sources: [a.jsonl]\nshedule: []", r"mix\.yaml:2: shedule: there is no such key; did you mean schedule\?"),
        ("sources: [a.jsonl]\nsources: [b.jsonl]", r"mix\.yaml:2: sources: this key is given twice"),
        ("sources:\n- a.jsonl\n- c.jsonl", r"mix\.yaml:3: sources\[1\]: c\.jsonl does not exist"),
        ("sources:\n- a.jsonl\n- {columns: {}}", r"mix\.yaml:3: sources\[1\]\.path: it is missing"),
        ("sources:\n- {path: a.jsonl, columns: [n]}", r"mix\.yaml:2: sources\[0\]\.columns: a mapping"),
        ("sources: [a.jsonl]\nnames: [a, b]", r"mix\.yaml:2: names: 2 names are given for 1 sources"),
        ("sources: [a.jsonl, b.jsonl]\nnames: [a, a]", r'mix\.yaml:2: names: two sources are called "a"'),
        ("sources: [a.jsonl, a.jsonl]", r'mix\.yaml:1: sources: two sources are called "a", after their files'),
        ("sources: [a.jsonl]\nstopping: forever", r"mix\.yaml:2: stopping: it has no meaning without a schedule"),
        (
            "S\n" + SCHEDULE + "stopping: all_exausted",
            r'stopping: "all_exausted" is not known; did you mean all_exhausted\?',
        ),
        ("S\nschedule: []", r"mix\.yaml:2: schedule: a list is expected, with at least one"),
        ("S\nschedule:\n- {weights: [1, 1]}", r"mix\.yaml:3: schedule\[0\]\.schedule_type: it is missing"),
        (
            "S\nschedule:\n- {schedule_type: cosine, weights: [1, 1]}",
            r'mix\.yaml:3: schedule\[0\]\.schedule_type: "cosine" is not known; there are const, linear',
        ),
        (
            "S\nschedule:\n- schedule_type: const\n  weights: [1]",
            r"mix\.yaml:4: schedule\[0\]\.weights: 1 weights for 2",
        ),
        ("S\nschedule:\n- {schedule_type: const, weights: [1, -1]}", r"weights: weights are 0 or more, and not all 0"),
        ("S\nschedule:\n- {schedule_type: const, weights: [0, 0]}", r"weights: weights are 0 or more, and not all 0"),
        ("S\nschedule:\n- {schedule_type: const, weights: [a, 1]}", r"weights: a number is expected, not 'a'"),
        (
            "S\nschedule:\n- {schedule_type: const, weights: [.nan, 1]}",
            r"weights: a number is expected|weights: weights",
        ),
        ("S\nschedule:\n- {schedule_type: const, weights: [1, 1], steps: 0.5}", r"steps: a whole number of steps"),
        ("S\nschedule:\n- {schedule_type: linear, weights: [1, 1], steps: 5}", r"a linear phase moves on from a phase"),
        (
            "S\nschedule:\n- {schedule_type: const, weights: [1, 1]}\n- {schedule_type: const, weights: [1, 0]}",
            r"mix\.yaml:3: schedule\[0\]\.steps: it is missing: a phase that others follow needs it",
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_file_line_and_key(folder: Path, text: str, sentence: str) -> None:
    (folder / "mix.yaml").write_text(text.replace("S\n", "sources: [a.jsonl, b.jsonl]\n"))
    with pytest.raises(DataError, match=sentence) as error:
        build_dataset(folder / "mix.yaml")
    assert "\n" not in str(error.value)


def test_a_mixture_stands_alone_and_must_be_there(folder: Path) -> None:
    with pytest.raises(DataError, match=r"stands alone"):
        build_dataset([mix(folder), folder / "a.jsonl"])
    with pytest.raises(DataError, match=r"none\.yaml cannot be read"):
        build_dataset(folder / "none.yaml")


@pytest.mark.parametrize("packing", [True, False])
def test_a_loader_says_of_which_source_and_row_the_samples_of_the_last_step_are(folder: Path, packing: bool) -> None:
    def transform(row: Any) -> dict[str, Any]:
        ids = [ord(row.source), *range(1, 1 + int(row["text"][1:]) % 7)]
        return {"input_ids": ids, "labels": ids}

    dataset = build_dataset(mix(folder), transform=transform)
    loader = build_dataloader(
        dataset, dp_rank=0, dp_size=1, micro_batch_size=2, global_batch_size=4, max_seq_len=16, packing=packing
    )
    step = next(iter(loader))
    for batch, sources, places in zip(step, loader.given_sources(), loader.given_places(), strict=True):
        if packing:
            ends = batch["cu_seq_lens_q"].tolist()
            samples = [batch["input_ids"][0, a:b] for a, b in pairwise(ends)]
        else:
            samples = [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        assert [(chr(ids[0]), len(ids)) for ids in samples] == sources
        for ids, place in zip(samples, places, strict=True):
            file, line = place.rsplit(":", 1)
            assert (Path(file).stem, (int(line) - 1) % 7) == (chr(ids[0]), len(ids) - 1)


def test_a_ledger_is_written_in_the_midst_of_a_step_if_asked(folder: Path, tmp_path: Path) -> None:
    dataset = build_dataset(folder / "a.jsonl", transform=lambda row: {"input_ids": [1], "labels": [1]})
    options: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": 1, "max_seq_len": 4}
    loader = build_dataloader(dataset, dp_rank=0, dp_size=1, ledger=tmp_path / "ledger", **options)
    steps = iter(loader)
    next(steps)
    with pytest.raises(DataError, match="no steps"):
        read_ledger(tmp_path / "ledger").find(1, 0)
    loader.write_ledger()
    assert len(read_ledger(tmp_path / "ledger").find(1, 0)[1].rows) == 1
