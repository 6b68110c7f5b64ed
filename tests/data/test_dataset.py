from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Ranks
from veomni_data import DataError, Row, build_dataset
from veomni_data.delimited import _fields, _records
from veomni_data.files import resolve_path

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
        ("a.csv", "n,n\n1,2\n", r'a\.csv:1: the header names the column "n" twice'),
        ("a.csv", "n,m\n1,2\n\n3\n", r"a\.csv:4: this record has 1 fields, the header 2"),
        ("a.csv", 'n\n1\n"2\n3\n', r"a\.csv:3: a quote is opened and not closed"),
        ("a.csv", "n,m\n", r"a\.csv is empty"),
        ("a.txt", "\n", r"a\.txt is empty"),
        ("a.arrow", "ARROW1 or not", r"a\.arrow cannot be read"),
        ("a.tar", "not a tar" * 100, r"a\.tar cannot be read: "),
        ("a.jsonl.gz", "", r"a\.jsonl\.gz is compressed and has no random access: unpack it, or use kind=\"iterable\""),
        ("a.png", "picture", r"a\.png is not a data file: its name must end in one of \.json"),
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


FORMATS = {
    "a.csv": b'text,n\n"a ""quoted"",\nline",1\n b ,\r\n\n"c\r\nd",3',
    "a.tsv": b'text\tn\n"a ""quoted"",\nline"\t1\n b \t\n"c\r\nd"\t3\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_quoted_fields_may_hold_line_ends_and_delimiters(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMATS[name])
    rows = [
        {"text": 'a "quoted",\nline', "n": "1"},
        {"text": " b ", "n": ""},
        {"text": "c\r\nd", "n": "3"},
    ]
    dataset = build_dataset(tmp_path)
    assert list(dataset) == rows
    assert [row.place.rpartition(":")[2] for row in dataset] == ["2", "4", "6" if name == "a.csv" else "5"]
    assert list(build_dataset(tmp_path, kind="iterable", shuffle_buffer=0)) == rows


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet='ab",\n', max_size=40))
def test_records_are_split_as_pythons_csv_module_does(tmp_path: Path, text: str) -> None:
    end = "end of the text"
    expected = [row for row in csv.reader(io.StringIO(f"{text}\n{end}", newline="")) if row and row != [""]]
    if expected.pop() != [end]:
        return  # a quote is not closed: it takes no further line with it here, another test says
    records = [_fields(r.decode(), ",") for _, _, r in _records(io.BytesIO(text.encode()), 0, ",") if r.strip()]
    assert [row for row in records if row != [""]] == expected


def test_a_long_field_is_read_and_the_limit_of_the_csv_module_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    before = csv.field_size_limit()
    assert len(build_dataset(tmp_path)[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_plain_text_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \n two \nthree")
    dataset = build_dataset(tmp_path)
    assert list(dataset) == [{"text": "one"}, {"text": " two "}, {"text": "three"}]
    assert dataset[1].place == f"{tmp_path}/a.txt:4"
    assert list(build_dataset(tmp_path, kind="iterable", shuffle_buffer=0)) == list(dataset)


def test_arrow_files_and_streams_are_mapped_and_survive_pickling(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{i}" for i in range(100)], "n": [[i] for i in range(100)]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=13)
    dataset = pickle.loads(pickle.dumps(build_dataset(tmp_path)))
    assert list(dataset) == table.to_pylist() * 2
    assert dataset[199].place == f"{tmp_path}/b.arrow, row 100"


def test_samples_of_a_tar_have_random_access(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (
            ("x/0.TXT", b"zero"), ("x/0.seg.png", b"\x89"), ("x/.hidden", b""), ("0.json", b"{"), ("x/0.txt", b"again"),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    dataset = build_dataset(tmp_path / "a.tar")
    assert len(dataset) == 3
    assert dataset[0] == {"__key__": "x/0", "txt": "zero", "seg.png": b"\x89"}
    assert dataset[-1]["txt"] == "again"
    with pytest.raises(DataError, match=r"a\.tar, sample 0: \.json is not JSON"):
        dataset[1]
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.tar"):
        build_dataset(tmp_path / "a.tar")


def test_a_folder_that_datasets_saved_is_read_with_its_splits(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).select([2, 0])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")
    for kind in ("mapping", "iterable"):
        for path, split, texts in (("one", "train", "ca"), ("splits", "train", "ca"), ("splits", "test", "c")):
            found = build_dataset(tmp_path / path, kind=kind, split=split, shuffle_buffer=0)
            assert "".join(row["text"] for row in found) == texts
    with pytest.raises(DataError, match='splits has no split "dev"'):
        build_dataset(tmp_path / "splits", split="dev")


def test_a_folder_laid_out_as_on_the_hub_is_read_by_datasets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i, texts in enumerate((["a", "b", "c"], ["d"])):
        write_parquet(tmp_path / "data" / f"train-{i:05}-of-00002.parquet", texts)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ["t"])
    assert "".join(row["text"] for row in build_dataset(tmp_path)) == "abcd"
    assert [row["text"] for row in build_dataset(tmp_path, split="test")] == ["t"]
    stream = build_dataset(tmp_path, kind="iterable", shuffle_buffer=0)
    assert "".join(row["text"] for row in stream) == "abcd"
    source = stream.sources[0]
    for parts in (1, 2, 5):
        found, places = [], []
        for number in range(parts):
            part = source.part(number, parts, seed=0, epoch=0)
            while (drawn := part.next()) is not None:
                found.append(source.encode(drawn[1])["text"])
                places.append(source.place(drawn[0]))
                assert source.encode(source.part(number, parts, seed=0, epoch=0).fetch(drawn[0]))["text"] == found[-1]
        assert sorted(found) == list("abcd")
        assert f"{tmp_path}, file 2 of 2, row 1" in places


def test_a_hub_id_goes_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, subset, split, streaming))
        if subset == "missing":
            raise ConnectionError("Couldn't reach the hub\nat all")
        rows = datasets.Dataset.from_dict({"text": list("abcde")})
        return rows.to_iterable_dataset(num_shards=3) if streaming else rows

    monkeypatch.setattr("datasets.load_dataset", load)
    assert [row["text"] for row in build_dataset("some/data", subset="en", split="test")] == list("abcde")
    stream = build_dataset("some/data", kind="iterable", shuffle_buffer=0)
    assert [row["text"] for row in stream] == list("abcde")
    assert asked == [("some/data", "en", "test", False), ("some/data", None, "train", True)]
    with pytest.raises(
        DataError, match=r"some/data is no file here and cannot be loaded from the Hugging Face hub: Co.*hub$"
    ):
        build_dataset("some/data", subset="missing")


def test_a_file_beside_a_root_is_refused_and_what_lies_in_it_is_found(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    (root / "below" / "in.png").touch()
    (tmp_path / "out.png").touch()
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "inner.png").symlink_to(root / "below" / "in.png")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "x.png").touch()
    below = root / "below"
    assert resolve_path("in.png", below, root) == below / "in.png"
    assert resolve_path("../inner.png", below, root) == below / "in.png"
    assert resolve_path(str(below / "in.png"), None, root) == below / "in.png"
    assert resolve_path("../../out.png", below, None).samefile(tmp_path / "out.png")
    for name in ("../../out.png", "../link.png", str(tmp_path / "out.png"), "../../root2/x.png", "../../nothing"):
        with pytest.raises(DataError, match="leads out of the data root") as error:
            resolve_path(name, below, root)
        assert error.value.reason == "path outside root"
    for name in ("nothing.png", "", "\0", "x" * 5000, "new\nline"):
        with pytest.raises(DataError) as error:
            resolve_path(name, below, root)
        assert error.value.reason == "missing file"
        assert "\n" not in str(error.value)


def test_rows_carry_their_root_and_source_even_in_another_process(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl")
    row = pickle.loads(pickle.dumps(build_dataset(tmp_path / "rows.jsonl", root=tmp_path, name="web")[1]))
    assert (row.root, row.source) == (tmp_path, "web")
    with pytest.raises(DataError, match="nothing is not a folder"):
        build_dataset(tmp_path / "rows.jsonl", root=tmp_path / "nothing")


def test_the_parts_of_a_mapping_have_every_row_once_and_go_on_from_a_state(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(50)])
    source = build_dataset(tmp_path).sources[0]
    parts = [source.part(v, 7, seed=1, epoch=2) for v in range(7)]
    order = []
    for number, part in enumerate(parts):
        refs = [drawn[0] for _ in range(5) if (drawn := part.next())]
        again = source.part(number, 7, seed=1, epoch=2, state=part.state_dict(refs[2:]))
        repeated = [drawn[0] for _ in range(3) if (drawn := again.next())]
        assert repeated == refs[2:]
        order += refs
        while (drawn := again.next()) is not None:
            order.append(drawn[0])
    assert sorted(order) == list(range(50))
    assert source.place(49) == f"{tmp_path}/rows.jsonl:50"


def test_an_iteration_goes_on_behind_a_broken_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{broken\n{"n": 3}\n')
    rows = iter(build_dataset(tmp_path / "a.jsonl"))
    assert next(rows) == {"n": 1}
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        next(rows)
    assert list(rows) == [{"n": 3}]


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_folder_where_we_are(path: str) -> None:
    with pytest.raises(DataError, match="the path of the data is empty"):
        build_dataset(path)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='kind="streaming" is not a kind of dataset'):
        build_dataset(write_lines(tmp_path / "rows.jsonl"), kind="streaming")
