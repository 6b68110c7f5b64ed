"""Architectures beyond the invariance matrix: every one that transformers has is exact in each layout, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch.nn.functional import cross_entropy
from veomni_models import build_foundation_model
from veomni_parallel import ParallelError, build_parallelize_model, global_sum, init_parallel_state, loss_scale

from tests.architectures import architectures, tiny_config
from tests.models.test_architectures import alone, count, tokens
from tests.parallel.families import slice_row
from tests.parallel.parity import gradients_of, pack, worst

TABLE = Path(__file__).parents[2] / "docs" / "parallel" / "architectures.md"
LAYOUTS: dict[str, dict[str, int]] = {"fsdp2 2": {}, "ulysses 2": {"ulysses": 2}, "tp 2": {"tp": 2}, "ep 2": {"ep": 2}}
ALWAYS = ("olmo2", "glm4_moe", "granitemoehybrid", "gemma3n_text")
HEADER = """# Any architecture in any layout

Written by `hatch run test-slow` (tests/parallel/test_architectures.py): every model type of transformers that
`docs/models/architectures.md` reports to keep samples apart, tiny, float32, a packed row on two ranks. *exact*: the
loss is within 1e-5 and every gradient within 5e-5 of each sample alone through the untouched model with eager
attention. *refused*: `build_parallelize_model`, or the first step, says in one sentence why (no experts, no plan in
transformers that works, layers that cannot be sliced). Nothing else occurs: no model is trained silently wrong.

"""


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, str]]]:
    """What each architecture did in each layout; a run of all of them is written down."""
    seen: dict[str, dict[str, str]] = {}
    yield seen
    known = {name: row for name, row in seen.items() if row}
    if len(seen) == len(architectures()) and all(len(row) == len(LAYOUTS) for row in known.values()):
        lines = [f"| | {' | '.join(LAYOUTS)} |", "|---" * (len(LAYOUTS) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(row.values())} |" for name, row in known.items()]
        TABLE.write_text(HEADER + "\n".join(lines) + "\n")


def step(name: str, sizes: dict[str, int], weights: dict[str, torch.Tensor]) -> Any:
    """Loss and gradients of a packed row on two ranks, or why not."""
    state = init_parallel_state(**sizes, device_type="cpu")
    model = build_foundation_model(tiny_config(name), init_device="cpu")
    model.load_state_dict(weights, strict=False)
    try:
        model = build_parallelize_model(model, state)
    except ParallelError:
        return "refused"
    row = pack(tokens()[state.dp.get_local_rank() :: state.dp.size()])
    if state.sp.size() > 1:
        row = slice_row(row, state.sp.get_local_rank(), state.sp.size())
    targets = row.pop("shift_labels")[0]
    del row["labels"]
    try:
        logits = model(**row).logits[0].float()
    except RuntimeError as error:  # the guard of the first step
        if "did not call the registered attention function" in str(error):
            return "refused"
        raise
    loss = cross_entropy(logits, targets, reduction="sum") / count()
    (loss * loss_scale(state)).backward()
    return global_sum(loss.detach(), state.loss).item(), gradients_of(model)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.slow) for n in architectures()]
)
def test_it_is_exact_or_refused(name: str, two_ranks: Ranks, table: dict[str, dict[str, str]]) -> None:
    reports = (TABLE.parents[1] / "models" / "architectures.md").read_text(encoding="utf-8")
    table[name] = {}
    if f"| {name} | yes | yes |" not in reports:
        pytest.skip("it does not train, or keeps samples apart in no layout")
    loss, reference, weights = alone(name)
    for layout, sizes in LAYOUTS.items():
        result = two_ranks.run(step, name, sizes, weights)[0]
        if result == "refused":
            table[name][layout] = "refused"
            continue
        assert result[0] == pytest.approx(loss, rel=1e-5), f"loss under {layout}"
        difference, where = worst(result[1], reference)
        assert difference <= 5e-5, f"under {layout} the gradient of {where} is off by {difference:.0e}"
        table[name][layout] = "exact"
