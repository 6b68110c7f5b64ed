"""The progress bar: on a terminal, late, by rich or without it, and never in the way."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from veomni_ckpt import cli


def run_bar(
    monkeypatch: pytest.MonkeyPatch, *, terminal: bool = True, quiet: bool = False, seconds: float = 2.0
) -> bool:
    """A bar that is told of four quarters within so many seconds; whether rich was asked for it."""
    now = 0.0
    asked = []

    def rich_bar(verb: str, total: int) -> Any:
        asked.append(verb)
        return make(verb, total)

    make = cli._rich_bar
    monkeypatch.setattr(cli, "_rich_bar", rich_bar)
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    bar = cli._Bar("writing", quiet)
    for quarter in range(1, 5):
        now = seconds * quarter / 4
        bar.update(25 * quarter, 100)
    bar.close()
    return bool(asked)


def test_nothing_is_shown_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not run_bar(monkeypatch, terminal=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options", [{"quiet": True}, {"seconds": 0.9}])
def test_quiet_and_short_runs_show_none_and_ask_for_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    assert not run_bar(monkeypatch, **options)
    assert capsys.readouterr().err == ""


def test_rich_draws_it_if_it_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert run_bar(monkeypatch)
    assert "writing" in capsys.readouterr().err


def test_without_rich_it_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_rich_bar", lambda verb, total: False)
    run_bar(monkeypatch)
    assert capsys.readouterr().err == "\rwriting  50 %\rwriting  75 %\rwriting 100 %\n"
