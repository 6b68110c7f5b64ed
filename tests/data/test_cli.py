from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from veomni_data import PackingCollator, build_dataset
from veomni_data.cli import main
from veomni_data.pipeline import DataDescription, build_pipeline

QUESTIONS = 40


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


@pytest.fixture
def pictures(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The same with a transformers processor and conversations about pictures."""
    tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens], special_tokens=True)
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
    )
    processor.save_pretrained(folder / "processor")
    for i in range(3):
        Image.new("RGB", (56, 56 * (i + 1)), (i * 60, 90, 200)).save(folder / f"{i}.png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>Which colour is </script><b>this</b>?"},
                {"role": "assistant", "content": f"blue {i}"},
            ],
            "images": [f"{i}.png"],
        }
        for i in range(3)
    ]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_shows_what_is_learnt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", "chats.jsonl", "--tokenizer", "tokenizer", "-n", "2", "--start", "1")
    assert (code, err) == (0, "")
    assert "chats.jsonl:2" in out
    assert "chats.jsonl:3" in out
    assert "chats.jsonl:4" not in out
    assert "Question 1? Hello there" in out
    assert "\u27e6Answer 1.<|im_end|>\u27e7" in out


def test_inspect_takes_rows_at_random_but_the_same_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [
        run(capsys, "inspect", "chats.jsonl", "--tokenizer", "tokenizer", "--random", seed)[1]
        for seed in ("1", "1", "2")
    ]
    assert shown[0] == shown[1] != shown[2]


def test_inspect_reads_a_stream_and_goes_on_behind_a_broken_row(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (folder / "chats.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text("\n".join([lines[0], "{", lines[1]]))
    for options in ((), ("--stream",)):
        code, out, _ = run(capsys, "inspect", "broken.jsonl", "--tokenizer", "tokenizer", *options)
        assert code == 0
        assert "broken: " in out
        assert "is not JSON" in out
        assert "Answer 0." in out
        assert "Answer 1." in out


def test_inspect_finds_out_what_kind_of_data_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "text.jsonl").write_text(json.dumps({"content_split": "Hello there"}))
    (folder / "odd.jsonl").write_text(json.dumps({"frage": "1 + 1?", "antwort": "2"}))
    (folder / "choice.jsonl").write_text(json.dumps({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."}))
    assert "Hello there<|im_end|>" in run(capsys, "inspect", "text.jsonl", "--tokenizer", "tokenizer")[1].translate(
        str.maketrans("", "", "\u27e6\u27e7")
    )
    named = ("--column", "prompt=frage", "--column", "completion=antwort")
    assert "\u27e62<|im_end|>\u27e7" in run(capsys, "inspect", "odd.jsonl", "--tokenizer", "tokenizer", *named)[1]
    chosen = run(capsys, "inspect", "choice.jsonl", "--tokenizer", "tokenizer")[1]
    assert "\u27e6Hello!<|im_end|>\u27e7" in chosen
    assert "sample 2 begins" in chosen
    code, out, err = run(capsys, "inspect", "odd.jsonl", "--tokenizer", "tokenizer")
    assert (code, out) == (2, "")
    assert "odd.jsonl:1: no conversation is found in the columns ['antwort', 'frage']" in err


def test_inspect_takes_a_chat_template_from_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "plain.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}Q: {{ m.content }} {% endif %}{% endfor %}"
    )
    options = ("--tokenizer", "tokenizer", "--chat-template", "plain.jinja", "-n", "1")
    assert "Q: Question 0?  A: \u27e6Answer 0.\u27e7" in run(capsys, "inspect", "chats.jsonl", *options)[1]


def test_the_page_needs_nothing_beside_it_and_no_data_is_markup(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "inspect", "pictures.jsonl", "--processor", "processor", "--html", "look.html")
    assert (code, err) == (0, "wrote look.html\n")
    assert "image: 0.png (56 x 56)" in out
    page = (pictures / "look.html").read_text()
    assert page.count('<img src="data:image/') == 3
    assert "<b>this</b>" not in page
    assert "&lt;b&gt;" in page
    assert "<script" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "3 samples" in page  # in one packed row
    assert [page.count(f">sample {n}: pictures.jsonl:{m}<") for n, m in ((1, 1), (2, 3), (3, 2))] == [1, 1, 1]
    assert "pixel_values" in page


def test_a_function_is_called_before_the_processor_is_loaded(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "mine_for_the_cli.py").write_text(
        "from pathlib import Path\n\ndef register():\n    Path('called').touch()\n"
    )
    options = ("--processor", "processor", "--register", "mine_for_the_cli:register")
    assert run(capsys, "inspect", "pictures.jsonl", *options)[0] == 0
    assert (pictures / "called").exists()
    code, _, err = run(capsys, "inspect", "pictures.jsonl", "--processor", "processor", "--register", "none_such:x")
    assert code == 2
    assert err.startswith("veomni-data: none_such:x cannot be imported as MODULE:FUNCTION: ModuleNotFoundError")
    assert err.count("\n") == 1


def test_position_ids_are_made_by_the_function_that_is_named(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "positions_for_the_cli.py").write_text(
        "import torch\n\ndef twice(sample):\n    return 2 * torch.arange(len(sample['input_ids'])).repeat(3, 1)\n"
    )
    options = ("--processor", "processor", "--positions", "positions_for_the_cli:twice", "--max-seq-len", "64")
    assert run(capsys, "prepare", "pictures.jsonl", "out", *options)[0] == 0
    row = build_dataset(pictures / "out")[0]
    restarting = torch.cat([torch.arange(n) for n in row["seq_lens"]])
    assert torch.equal(row["position_ids"], 2 * restarting.repeat(3, 1))


def test_a_worker_that_dies_is_one_sentence(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "deadly_for_the_cli.py").write_text(
        "import os\nimport signal\n\ndef die(sample):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    options = ("--processor", "processor", "--positions", "deadly_for_the_cli:die", "--max-seq-len", "64")
    code, _, err = run(capsys, "prepare", "pictures.jsonl", "out", *options, "--workers", "1")
    assert code == 2
    assert err.startswith("veomni-data: a worker process died (out of memory?): DataLoader worker")
    assert err.count("\n") == 1
    code, _, err = run(capsys, "stats", "pictures.jsonl", *options, "--workers", "1")
    assert code == 2
    assert err.startswith("veomni-data: a worker process died")


def test_a_package_that_is_not_installed_is_one_sentence(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "lacking_for_the_cli.py").write_text(
        "def lack(sample):\n    raise ImportError('video needs PyAV: pip install it')\n"
    )
    options = ("--processor", "processor", "--positions", "lacking_for_the_cli:lack")
    for workers in ("0", "1"):
        code, _, err = run(capsys, "stats", "pictures.jsonl", *options, "--workers", workers)
        assert code == 2
        assert err.endswith("video needs PyAV: pip install it\n")
        assert err.count("\n") == 1


def test_limits_of_pictures_are_handed_on(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*options: str) -> int:
        out = run(capsys, "stats", "pictures.jsonl", "--processor", "processor", "--json", *options)[1]
        return int(json.loads(out)["tokens"])

    assert tokens("--limit-media", "max_pixels=3136") < tokens()
    code, _, err = run(capsys, "stats", "pictures.jsonl", "--processor", "processor", "--limit-media", "pixels=1")
    assert code == 2
    assert "pixels is no limit: there are max_image_nums, max_pixels" in err


def test_stats_counts_what_there_is(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "mix.yaml").write_text("sources: [pictures.jsonl, chats.jsonl]\n")
    with (pictures / "pictures.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "<image>"}], "images": ["none.png"]}) + "\n{")
    code, out, err = run(capsys, "stats", "mix.yaml", "--processor", "processor", "--json", "--row-lengths", "40,1024")
    assert (code, err) == (0, "")
    stats = json.loads(out)
    pipeline = build_pipeline(DataDescription("mix.yaml", processor="processor"))
    samples = [pipeline.encode(row)[0] for row in map(pipeline.rows.__getitem__, [0, 1, 2, *range(5, 45)])]
    assert stats["rows"] == QUESTIONS + 5
    assert stats["samples"] == len(samples) == QUESTIONS + 3
    assert stats["tokens"] == sum(len(s["input_ids"]) for s in samples)
    assert stats["targets"] == sum(int((s["labels"][1:] != -100).sum()) for s in samples)
    assert {name: s["samples"] for name, s in stats["sources"].items()} == {"pictures": 3, "chats": QUESTIONS}
    assert sum(s["token_share"] for s in stats["sources"].values()) == pytest.approx(1)
    assert {name: m["samples"] for name, m in stats["modalities"].items()} == {"image": 3, "text": QUESTIONS}
    assert sum(entry["rows"] for entry in stats["skipped"].values()) == 2
    assert any("pictures.jsonl:5: this line is not JSON" in entry["first"] for entry in stats["skipped"].values())
    short, long = stats["packing"]
    assert long["whole"] == stats["tokens"] / (long["rows"] * 1024)
    assert long["too_long"] == 0 < short["too_long"] == sum(len(s["input_ids"]) > 40 for s in samples)


def test_stats_are_the_same_with_workers_and_of_prepared_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stats(*arguments: str) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads(run(capsys, "stats", *arguments, "--json")[1])
        return figures

    alone = stats("chats.jsonl", "--tokenizer", "tokenizer")
    assert stats("chats.jsonl", "--tokenizer", "tokenizer", "--workers", "2") == alone
    assert run(capsys, "prepare", "chats.jsonl", "out", "--tokenizer", "tokenizer", "--max-seq-len", "256")[0] == 0
    prepared = stats("out")
    for key in ("samples", "tokens", "targets", "length_percentiles", "target_percentiles"):
        assert prepared[key] == alone[key]


def test_stats_prints_tables_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "stats", "chats.jsonl", "--tokenizer", "tokenizer", "--png", "stats.png")
    assert (code, err) == (0, "wrote stats.png\n")
    for word in (f"{QUESTIONS} samples", "tokens of a sample", "modality", "streamed"):
        assert word in out
    with Image.open(folder / "stats.png") as picture:
        assert picture.size > (800, 600)


def test_stats_of_plain_text_cuts_what_is_longer_than_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "text.jsonl").write_text(json.dumps({"text": "Hello there " * 50}))
    out = run(capsys, "stats", "text.jsonl", "--tokenizer", "tokenizer", "--json", "--row-lengths", "10")[1]
    stats = json.loads(out)
    assert stats["samples"] == 1
    assert stats["packing"][0]["rows"] == -(-stats["tokens"] // 10)


def test_prepared_data_are_shown_without_a_tokenizer_being_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "prepare", "chats.jsonl", "out", "--tokenizer", "tokenizer", "--max-seq-len", "512")
    assert (code, err) == (0, "")
    assert out.startswith("out: ")
    assert out.endswith(f"% full, of {QUESTIONS} samples\n")
    code, out, err = run(capsys, "inspect", "out", "-n", "1", "--html", "rows.html")
    assert (code, err) == (0, "wrote rows.html\n")
    assert "out/part-00000.arrow, row 1: " in out
    assert "sample 1: chats.jsonl:" in out
    assert "sample 2 begins" in out
    assert "<details open>" in (folder / "rows.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "none.jsonl", "--tokenizer", "tokenizer"], "none.jsonl does not exist"),
        (["inspect", "chats.jsonl"], "text needs the folder of a tokenizer"),
        (["inspect", "chats.jsonl", "--tokenizer", "nowhere"], "nowhere does not exist: it should be the folder of a"),
        (["inspect", "chats.jsonl", "--tokenizer", "."], ". holds no tokenizer that transformers can load"),
        (["inspect", "chats.jsonl", "--processor", "tokenizer"], "tokenizer holds a "),
        (
            ["inspect", "chats.jsonl", "--tokenizer", "tokenizer", "--start", "999"],
            "there is no row 999: the data have fewer",
        ),
        (["inspect", "chats.jsonl", "--tokenizer", "tokenizer", "--chat-template", "x"], "no chat template is called"),
        (["inspect", "chats.jsonl", "--tokenizer", "tokenizer", "--html", "no/x.html"], "no/x.html"),
        (
            ["inspect", "chats.jsonl", "--tokenizer", "tokenizer", "--chat-template", "no.jinja"],
            "no.jinja: No such file or directory",
        ),
        (["prepare", "chats.jsonl", "tokenizer", "--tokenizer", "tokenizer", "--max-seq-len", "64"], "is not empty"),
        (["stats", "chats.jsonl", "--tokenizer", "tokenizer", "--png", "x.nonsense"], "x.nonsense cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert sentence in err
    assert err.startswith("veomni-data: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspct"], "invalid choice: 'inspct'"),
        (["inspect", "x", "-n", "0"], "'0' is not a whole number >= 1"),
        (["inspect", "x", "--column", "a"], "'a' is not OURS=THEIRS"),
        (["stats", "x", "--row-lengths", "8,x"], "'x' is not a whole number >= 1"),
        (["prepare", "x", "y"], "the following arguments are required: --max-seq-len"),
        (["prepare", "x", "y", "--max-seq-len", "8", "--max-skipped", "2"], "'2' is not a share from 0 to 1"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


def test_help_says_how_a_command_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "stats", "prepare"):
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        assert f"veomni-data {command} " in out.partition("examples:")[2]


def test_the_module_runs_and_a_closed_pipe_is_no_error(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "veomni_data.cli",
        "inspect",
        "chats.jsonl",
        "--tokenizer",
        "tokenizer",
        "-n",
        "40",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "learnt" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_prepared_pictures_make_the_batch_that_their_samples_make(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--processor", "processor", "--max-seq-len", "1024", "--in-order")
    assert run(capsys, "prepare", "pictures.jsonl", "out", *options)[0] == 0
    (row,) = build_dataset(pictures / "out")
    pipeline = build_pipeline(DataDescription("pictures.jsonl", processor="processor"))
    samples = sorted(pipeline.dataset(), key=lambda sample: -len(sample["input_ids"]))  # as they are packed
    direct, prepared = PackingCollator()(samples), PackingCollator()([row])
    assert "pixel_values" in direct
    assert direct.keys() == prepared.keys()
    for key, value in direct.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(prepared[key])), key
