"""`veomni ls`, `veomni cp`, `veomni doctor`: what a newcomer types first."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from veomni_recipes.catalog import describe_config, describe_recipe, recipe_of, shipped_configs
from veomni_recipes.cli import RECIPES, main


def test_every_recipe_and_configuration_is_listed_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    printed = capsys.readouterr().out
    for name, module in RECIPES.items():
        assert re.search(rf"^{name} +{re.escape(describe_recipe(module))}$", printed, re.MULTILINE)
    for name, path in shipped_configs().items():
        assert re.search(rf"^  {name} +{re.escape(describe_config(path))}$", printed, re.MULTILINE)
        assert recipe_of(name) in RECIPES
        assert len(describe_config(path)) > 20


def test_a_copied_recipe_and_configuration_run_outside_of_the_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cp", "train_torch", str(tmp_path / "mine.py")]) == 0
    assert main(["cp", "sft/qwen3_lora", str(tmp_path / "mine")]) == 0
    assert f"run it: veomni run {tmp_path}/mine.py" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["qwen3_lora.yaml", "qwen3_sft.yaml"]
    config = tmp_path / "mine" / "qwen3_lora.yaml"
    schema = re.search(r"\$schema=(\S+)", config.read_text())
    assert schema
    assert Path(schema[1]).is_file()
    command = [sys.executable, str(tmp_path / "mine.py"), str(config), "--model.model_path=nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("nowhere: no such folder")
    assert "Traceback" not in done.stderr


def test_a_folder_gets_the_recipe_with_a_configuration(tmp_path: Path) -> None:
    assert main(["cp", "train_omni_model", str(tmp_path)]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".py", ".yaml"]


@pytest.mark.parametrize(
    ("name", "part"), [("train_troch", "there is no recipe or configuration"), ("train_torch", "is there already")]
)
def test_what_cannot_be_copied_is_one_sentence(
    name: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("mine")
    assert main(["cp", name, str(tmp_path / "mine.py")]) == 2
    assert part in capsys.readouterr().err
    assert (tmp_path / "mine.py").read_text() == "mine"


def test_the_doctor_says_what_will_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^torch +2\.", printed, re.MULTILINE)
    assert re.search(r"^all_reduce +\d+\.\d\d GB/s", printed, re.MULTILINE)
    assert "attention (model.attn_implementation: auto)" in printed
