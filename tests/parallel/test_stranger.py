"""The codebase of a stranger: its script needs torch and veomni-parallel, and is as exact as one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "stranger.py"
FOUR_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(SCRIPT)]


def run(python: str, *arguments: str) -> str:
    done = subprocess.run([python, *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step .* loss (\S+)$", output, re.MULTILINE)]


def test_four_ranks_are_as_exact_as_one_process() -> None:
    alone = run(sys.executable, str(SCRIPT), "--check", "--steps", "20")
    shared = run(sys.executable, *FOUR_RANKS, "--check", "--steps", "20", "--ulysses", "2", "--experts", "2")
    assert "as one process: loss" in shared
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(shared)[-1] < losses(shared)[0] - 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_alone_is_enough(tmp_path: Path) -> None:
    python = clean_environment(tmp_path)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path)]
    subprocess.run([*wheel, str(ROOT / "packages" / "veomni-parallel")], check=True, timeout=300)
    install = ["-m", "pip", "install", "--no-deps", "-q", *map(str, tmp_path.glob("veomni_parallel-*.whl"))]
    subprocess.run([python, *install], check=True, timeout=100)

    absent = "import importlib.util as i; print([n for n in ('transformers', 'veomni_data') if i.find_spec(n)])"
    assert run(python, "-c", absent) == "[]\n"
    assert str(tmp_path) in run(python, "-c", "import veomni_parallel; print(veomni_parallel.__file__)")
    output = run(python, *FOUR_RANKS, "--check", "--steps", "20", "--ulysses", "2", "--experts", "2")
    assert "as one process: loss" in output


def clean_environment(folder: Path) -> str:
    """A virtual environment with pip, torch and what torch needs, which are linked and not downloaded again."""
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    linked = folder / "linked"
    linked.mkdir()
    wanted, known = ["torch"], set()
    while wanted:
        name = wanted.pop()
        if name in known:
            continue
        known.add(name)
        found = distribution(name)
        for file in found.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (linked / top).exists():
                (linked / top).symlink_to(os.fspath(found.locate_file(top)))
        for requirement in found.requires or ():
            if "extra ==" not in requirement and "platform_" not in requirement:
                wanted.append(re.split(r"[\s;<>=!~\[(]", requirement)[0])
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "linked.pth").write_text(f"{linked}\n")
    return str(folder / "venv" / "bin" / "python")
