"""The page about runs: what stands in it, and how a browser shows it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from veomni_recipes.cli import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_run(folder: Path, *, lr: float, steps: int = 40, note: str = "") -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": i, "loss": 2 / i + lr, "lr": lr, "tokens": 100, "tokens_per_second": 10.0 * i, "share": {"a": 0.5}}
        for i in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"train:\n  lr: {lr}\n  seed: 3\ndata:\n  train_path: {json.dumps(note)}\n")
    (folder / "summary.json").write_text(json.dumps({"all_accuracy": 0.975, "seconds": 12.0, "parameters": 12345}))
    answer = {"question": "Which digit?", "text": "two", "truth": "three"}
    (folder / "predictions.jsonl").write_text(json.dumps(answer) + "\n")
    Image.new("RGB", (8, 8), "red").save(folder / "predictions.png")
    return folder


def test_the_page_has_figures_differences_and_answers(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", lr=0.1, note="</script><b>x")
    second = make_run(tmp_path / "second", lr=0.2, note="</script><b>x")
    page = tmp_path / "report.html"
    assert main(["report", str(first), str(second), "--output", str(page)]) == 0
    text = page.read_text()
    assert "97.5%" in text
    assert "12,345" in text
    assert text.count("data:image/png;base64,") == 2
    differences = text.partition('id="differences"')[2].partition("</table>")[0]
    assert "train.lr" in differences
    assert "train.seed" not in differences
    assert "<b>x" not in text  # what a run holds is no markup
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing is loaded from elsewhere


def test_the_series_of_a_step_and_of_validations_stand_together(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lr=0.1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = {"mfu": 0.4, "peak_memory_gb": 1.5, "data_wait_seconds": 0.1, "seconds": 1.0, "samples": 3}
    for line in lines:
        line |= {**more, "losses_by_source": {"web": 1.0, "books": 2.0}, "losses": {"text": 1.0}}
    lines[5]["loss"] = float("nan")  # of a step that was skipped
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validations = [{"step": step, "loss": 2 / step, "accuracy": 0.5, "targets": 9} for step in (10, 20)]
    (run / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validations))
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    text = page.read_text()
    charts = json.loads(text.partition("const charts = ")[2].partition(", names = ")[0])
    assert [chart["metric"] for chart in charts] == [
        "loss",
        "validation: loss",
        "validation: accuracy",
        "lr",
        "tokens_per_second",
        "mfu",
        "peak_memory_gb",
        "data_wait_seconds",
        "losses: text",
        "losses_by_source: books",
        "losses_by_source: web",
        "tokens",
        "share: a",
        "seconds",
        "samples",
    ]
    assert len(charts[0]["runs"][0]["values"]) == 39
    assert charts[1]["runs"][0]["steps"] == [10, 20]
    for figure in ("<td>40.0%</td>", "<td>10.0%</td>", "<td>1.50</td>", "<td>0.1000 at step 20</td>"):
        assert figure in text


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lr=0.1, steps=50_000)
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert page.stat().st_size < 400_000


def test_what_is_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", lr=0.1)
    page = str(tmp_path / "report.html")
    assert main(["report", str(tmp_path), "--output", page]) == 2
    assert f"{tmp_path} is not the folder of a run" in capsys.readouterr().err
    assert main(["report", str(run), str(run), "--output", page]) == 2
    assert "named twice" in capsys.readouterr().err
    assert main(["report", str(run), "--output", str(tmp_path / "no/where.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (run / "summary.json").write_text("{")
    assert main(["report", str(run), "--output", page]) == 2
    assert str(run) in capsys.readouterr().err
    assert not Path(page).exists()


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_browser_draws_the_curves(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    runs = [str(make_run(tmp_path / name, lr=lr)) for name, lr in (("first", 0.1), ("second", 0.2))]
    assert main(["report", *runs, "--output", str(page)]) == 0
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=100, check=True
    )
    figures = done.stdout.split("<figure>")[1:]
    assert len(figures) == 5
    assert all(figure.count("<polyline") == 2 for figure in figures)
    assert figures[0].startswith("<figcaption>loss")
    first = figures[0].partition('points="')[2].partition('"')[0].split()
    assert len(first) == 40
    heights = [float(point.partition(",")[2]) for point in first]
    assert heights == sorted(heights)  # a falling loss: down the page
