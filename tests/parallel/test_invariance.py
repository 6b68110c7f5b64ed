"""The invariance matrix: every model in every layout has the loss, gradients and norm of each sample alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks

from tests.parallel.invariance import LAYOUTS, SUBJECTS, errors, inapplicable, step

TOLERANCE = 1e-5
TABLE = Path(__file__).parents[2] / "docs" / "parallel" / "invariance.md"
CELLS = [(name, layout) for name in SUBJECTS for layout in LAYOUTS if not inapplicable(name, layout)]
ALWAYS = {
    ("Llama4", "ep 2 x ulysses 2"),
    ("Qwen3-Next", "ulysses 2"),
    ("Phi-3", "tp 2 x dp 2"),
    ("Qwen3-VL-MoE", "ep 2 x tp 2"),
    ("Qwen2.5-Omni thinker", "fsdp2 4"),
    ("Flux (diffusers)", "dp 2 x ulysses 2"),
    ("Wan (diffusers)", "ulysses 2"),
    ("Qwen-Image (diffusers)", "tp 2"),
}
"""What runs with every change; all other cells are marked slow."""
HEADER = """# Invariance matrix

Written by `hatch run test-slow` (tests/parallel/test_invariance.py). Each cell is one step of a tiny model in float32
on CPU ranks: samples packed into uneven rows, two micro-batches, activations recomputed; with four data-parallel ranks
the second has neither pictures nor sounds. The truth is one process that runs each sample alone through the untouched
model of transformers or diffusers. A number is the largest difference of any gradient, relative to its tensor's largest
value. The loss and the norm of all gradients differ by less than 1e-5 too. Other layers of proof: an expert without
tokens, a rank whose rows have no pictures, clipping, and other options are in tests/parallel.

A dash: the layout has no meaning for the model, as it has no experts, or no tensor parallel plan (gpt-oss and Wan have
none; Flux has one with joined blocks of two sizes).
"""


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], float]]:
    """The worst gradient of each cell; a run of all cells that pass writes them down."""
    worst: dict[tuple[str, str], float] = {}
    yield worst
    if worst.keys() == set(CELLS):
        lines = [f"| | {' | '.join(LAYOUTS)} |", "|---" * (len(LAYOUTS) + 1) + "|"]
        for name in SUBJECTS:
            cells = [f"{worst[name, layout]:.0e}" if (name, layout) in worst else "-" for layout in LAYOUTS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        TABLE.write_text(f"{HEADER}\n" + "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "layout"), [pytest.param(*cell, marks=[] if cell in ALWAYS else pytest.mark.slow) for cell in CELLS]
)
def test_every_model_in_every_layout_is_each_sample_alone(
    name: str, layout: str, two_ranks: Ranks, four_ranks: Ranks, table: dict[tuple[str, str], float]
) -> None:
    ranks = two_ranks if LAYOUTS[layout][0] == 2 else four_ranks
    results = ranks.run(step, name, layout)
    off = errors(name, results[0])
    assert all(error <= TOLERANCE for error in off.values()), off
    assert all(result["norm"] == results[0]["norm"] for result in results), "the norm differs between ranks"
    table[name, layout] = off["gradient"]
