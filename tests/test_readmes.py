"""The snippets that people will copy first."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = [Path(__file__).parents[1] / "packages" / name for name in ("veomni-models", "veomni-recipes")]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_first_snippet_of_a_readme_runs(package: Path, tmp_path: Path) -> None:
    snippet = re.search(r"```python\n(.*?)```", (package / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippet, f"{package.name}/README.md has no python snippet"
    done = subprocess.run([sys.executable, "-c", snippet[1]], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
