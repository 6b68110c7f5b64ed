"""Every shipped configuration runs as it is with a tiny model; `veomni check` compares its layout with one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from veomni_recipes.catalog import recipe_of, shipped_configs

IN_EVERY_RUN = [("pretrain/qwen3_moe", 2)]
OTHER_DATA = ("multimodal/omni/digits_tokenizer",)
"""Configurations whose recipe takes no model that could be made smaller; a test of their own trains them."""
CASES = [
    pytest.param(
        name, ranks, marks=() if name in IN_EVERY_RUN and ranks == 2 else pytest.mark.slow, id=f"{name}-{ranks}"
    )
    for name in shipped_configs()
    for ranks in (1, 2)
    if name not in OTHER_DATA
]


def veomni(*arguments: str, folder: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "NPROC_PER_NODE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "veomni_recipes.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_a_shipped_configuration_runs(name: str, ranks: int, tmp_path: Path) -> None:
    done = veomni("run", recipe_of(name), str(shipped_configs()[name]), "--smoke", folder=tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "outputs" / "smoke" / Path(name).name / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= 2
    assert all(line["loss"] > 0 for line in lines)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "changes", "rank_count"),
    [
        ("multimodal/omni/digits_draw", [], "2 ranks"),
        pytest.param("multimodal/omni/digits_draw_tokens", [], "2 ranks", marks=pytest.mark.slow),
        pytest.param("sft/qwen3_lora", [], "2 ranks", marks=pytest.mark.slow),
        pytest.param("sft/qwen3_ulysses", ["--train.tensor_parallel_size=2"], "4 ranks", marks=pytest.mark.slow),
        pytest.param("pretrain/qwen3_moe", [], "2 ranks", marks=pytest.mark.slow),
        pytest.param("pretrain/deepseek_v3", [], "2 ranks", marks=pytest.mark.slow),
        pytest.param("multimodal/qwen3_vl", [], "2 ranks", marks=pytest.mark.slow),
    ],
)
def test_check_finds_the_gradients_of_one_process(
    name: str, changes: list[str], rank_count: str, tmp_path: Path
) -> None:
    done = veomni("check", str(shipped_configs()[name]), *changes, folder=tmp_path, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rank_count in done.stdout
    assert "no leak" in done.stdout
    assert done.stdout.splitlines()[-1] == "PASS"
    if "draw" in name:
        assert "pictures" in done.stdout or "tokens" in name  # whose codes are text
        assert "reaches decoders.image" in done.stdout or "tokens" in name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_check_fails_on_a_recipe_that_forgets_part_of_the_gradient(tmp_path: Path) -> None:
    from veomni_recipes.cli import main

    assert main(["cp", "train_torch", str(tmp_path / "mine.py")]) == 0
    text = (tmp_path / "mine.py").read_text()
    # on ranks half of a gradient is lost in the first layer
    broken = text.replace("    return model\n", BROKEN, 1)
    assert broken != text
    (tmp_path / "mine.py").write_text(broken)
    config = str(shipped_configs()["sft/qwen3_sft"])
    done = veomni("check", config, "--recipe", str(tmp_path / "mine.py"), folder=tmp_path, ranks=1)
    assert done.returncode == 2, done.stdout
    assert "FAIL" in done.stdout
    assert "Traceback" not in done.stderr


BROKEN = """    if cfg.model.attn_implementation != "eager":
        model.model.layers[0].mlp.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] * 0.5,))
    return model
"""
