from __future__ import annotations

import re
from pathlib import Path


def test_the_snippet_of_the_readme_trains_a_model() -> None:
    readme = Path(__file__).parents[2] / "packages" / "veomni-parallel" / "README.md"
    snippet = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert snippet is not None
    names: dict[str, object] = {}
    exec(compile(snippet[1], str(readme), "exec"), names)
    losses = names["losses"]
    assert isinstance(losses, list)
    assert losses[-1] < losses[0]
