from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages/veomni-ckpt/README.md"


def test_the_snippet_of_the_readme_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert snippet
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time it resumes at the end
        exec(compile(snippet[1], str(README), "exec"), {})
        assert capsys.readouterr().out == "newest checkpoint: 5\n"
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["global_step_4", "global_step_5"]
