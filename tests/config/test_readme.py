"""The README's example does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages" / "veomni-config" / "README.md"


def test_the_readmes_example_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    exec(compile(code[1], str(README), "exec", dont_inherit=True), {"__name__": "readme"})
    promised = re.findall(r"(?:^    |  )# (.+)$", code[1], re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised
    assert (tmp_path / "resolved.yaml").is_file()
