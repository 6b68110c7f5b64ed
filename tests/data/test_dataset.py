from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import Ranks
from veomni_data import DataError, Row, build_dataset

ROWS = [{"text": "a"}, {"text": ["b", 1]}, {"text": "ü", "more": None}]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path: Path, rows: list[Any] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}), path)
    return path


def test_lines_and_an_array_give_the_same_rows_whatever_their_types(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "rows.jsonl")
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_bytes(lines.read_bytes())
    for name in ("rows.jsonl", "array.json", "lines.json"):
        dataset = build_dataset(tmp_path / name)
        assert list(dataset) == ROWS
        assert (len(dataset), dataset[-1], dataset[1:]) == (3, ROWS[2], ROWS[1:])
        with pytest.raises(IndexError):
            dataset[3]


def test_blank_lines_bom_and_windows_line_ends_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\r\n \t \n\n  {"n": 2}\n{"n": 3}')
    dataset = build_dataset(tmp_path / "rows.jsonl")
    assert [row["n"] for row in dataset] == [1, 2, 3]
    assert [row.place.rpartition(":")[2] for row in dataset] == ["1", "5", "6"]


def test_a_row_knows_its_place_and_folder_even_in_another_process(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl")
    row = pickle.loads(pickle.dumps(build_dataset(tmp_path / "rows.jsonl")[1]))
    assert isinstance(row, Row)
    assert (dict(row), row.place, row.folder) == (ROWS[1], f"{tmp_path}/rows.jsonl:2", tmp_path)


def test_folder_glob_and_lists_give_the_files_in_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "b"}])
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    write_parquet(tmp_path / "c.parquet", ["c", "d"])
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "below").mkdir()
    write_lines(tmp_path / "below" / "e.jsonl", [{"text": "e"}])
    paths: dict[Any, str] = {
        tmp_path: "abcd",
        f"{tmp_path}/*.jsonl": "ab",
        f"{tmp_path}/**/*.jsonl": "abe",
        f"{tmp_path}/b.jsonl, {tmp_path}/a.jsonl": "ba",
        (f"{tmp_path}/b.jsonl", tmp_path / "below"): "be",
    }
    for path, texts in paths.items():
        assert "".join(row["text"] for row in build_dataset(path)) == texts


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    for texts in (["a", "b"], ["c", "d"]):
        path = write_parquet(tmp_path / "rows.parquet", texts)
        assert [row["text"] for row in build_dataset(path)] == texts
        lines = write_lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
        assert [row["text"] for row in build_dataset(lines)] == texts


def read_parquet(path: str, cache: str) -> list[Any]:
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    return [(row["text"], row.place) for row in build_dataset(path)]


def test_two_ranks_read_a_new_parquet_file_at_once(tmp_path: Path, two_ranks: Ranks) -> None:
    path = write_parquet(tmp_path / "rows.parquet", ["a", "b"])
    expected = [("a", f"{path}, row 1"), ("b", f"{path}, row 2")]
    assert two_ranks.run(read_parquet, str(path), str(tmp_path / "cache")) == [expected, expected]


def test_the_transform_runs_when_a_row_is_asked_for_and_its_errors_name_the_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl")

    def transform(row: Row) -> str:
        if row["text"] == "ü":
            raise DataError("this is not English")
        return row["text"].upper()

    dataset = build_dataset(tmp_path / "rows.jsonl", transform=transform)
    assert dataset[0] == "A"
    with pytest.raises(DataError, match=r"rows\.jsonl:3: this is not English"):
        dataset[2]
    with pytest.raises(AttributeError) as mistake:
        dataset[1]
    assert mistake.value.__notes__ == [f"while transforming {tmp_path}/rows.jsonl:2"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"n": 1}\n\n{"n": \n', r"a\.jsonl:3: this line is not JSON \(Expecting value, column 7\)"),
        ("a.jsonl", '{"n": 1}\n[1]\n', r"a\.jsonl:2: a row must be an object with named columns, not a list"),
        ("a.json", '[{"n": 1},\n{"n" 2}]', r"a\.json:2: this is not JSON"),
        ("a.json", '[{"n": 1},\n7]', r"a\.json, entry 2: a row must be an object"),
        ("a.json", '{\n"n": 1\n}', r"a\.json:1: this line is not JSON"),
        ("a.jsonl", "\n \n", r"a\.jsonl is empty"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.parquet", "PAR1 or not", r"a\.parquet is not a Parquet file"),
        ("a.txt", "text", r"a\.txt is not a data file: its name must end in one of \.json"),
    ],
)
def test_a_broken_file_is_one_sentence_with_its_line(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence) as error:
        list(build_dataset(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n{"n": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: this line is not UTF-8 \(byte 8\)"):
        list(build_dataset(tmp_path / "a.jsonl"))


def test_a_parquet_file_with_damaged_columns_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"{'x' * 100}{i}" for i in range(1000)])
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: "):
        build_dataset(path)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("missing", "missing does not exist"),
        ("missing.jsonl", r"missing\.jsonl does not exist"),
        ("*.nothing", r"no file matches .*\*\.nothing"),
        ("", "holds no data file"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, path: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        build_dataset(f"{tmp_path}/{path}")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='kind="streaming" is not a kind of dataset'):
        build_dataset(write_lines(tmp_path / "rows.jsonl"), kind="streaming")
