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
