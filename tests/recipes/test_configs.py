from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import veomni_recipes

CONFIGS = Path(veomni_recipes.__file__).parent / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_is_valid_and_names_the_schema_that_editors_complete_it_by(config: Path) -> None:
    comment = re.match(r"# yaml-language-server: \$schema=(\S+)\n", config.read_text(encoding="utf-8"))
    assert comment
    schema = config.parent / comment[1]
    command = [str(Path(sys.executable).with_name("veomni-config"))]
    current = subprocess.run([*command, "schema", "--recipe", schema.stem], capture_output=True, text=True, check=True)
    assert json.loads(schema.read_text(encoding="utf-8")) == json.loads(current.stdout), (
        f"{schema} is not current: write it anew by veomni-config schema --recipe {schema.stem}"
    )
    # not `validate`, which looks for the data that a script beside the config writes
    done = subprocess.run([*command, "show", str(config), "--recipe", schema.stem], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
