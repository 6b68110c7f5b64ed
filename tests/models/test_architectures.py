"""Every architecture of transformers that writes text is built, trained, saved and loaded, and keeps samples apart."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from veomni_models import build_foundation_model
from veomni_models.foundation import auto_class_for
from veomni_parallel import ParallelError, build_parallelize_model, init_parallel_state

from tests.architectures import architectures, tiny_config
from tests.parallel.parity import Gradients, pack, samples, worst

TABLE = Path(__file__).parents[2] / "docs" / "models" / "architectures.md"
ALWAYS = (
    *("qwen3", "bloom", "falcon_mamba", "gpt_oss", "deepseek_v32", "deepseek_v4", "roberta", "llama4", "qwen2_5_vl"),
    *("openai-gpt", "xlstm"),
)
"""What runs with every change; all others are marked slow."""
HEADER = """# Architectures

Written by `hatch run test-slow` (tests/models/test_architectures.py): every model type of the installed transformers
({version}) that has a class for causal language modelling, text from images, or text from any modality; found in
transformers' own mappings, made tiny, with random weights, in float32.

- *trains*: `build_foundation_model` builds it (attention `auto`), its loss falls in three steps of AdamW, and
  `save_pretrained` followed by `build_foundation_model` of the folder gives the same logits to the bit. Text alone is
  trained, and a picture of zeros where the model cannot do without.
- *packed = separate*: the loss of a packed row in `build_parallelize_model` is that of each sample alone through the
  untouched model with eager attention within 1e-5, and every gradient within 5e-5 of its tensor's largest value.

{trained} of {all} train ({share:.0%}), {packed} keep the samples of a packed row apart.

| Model type | trains | packed = separate |
|---|---|---|
"""


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], str]]:
    """What each architecture did in each test; a run of all of them is written down."""
    import transformers

    seen: dict[tuple[str, str], str] = {}
    yield seen
    names = architectures()
    if len(seen) == 2 * len(names):
        counts = {test: sum(seen[name, test] == "yes" for name in names) for test in ("trains", "packed")}
        head = HEADER.format(
            version=transformers.__version__,
            all=len(names),
            trained=counts["trains"],
            packed=counts["packed"],
            share=counts["trains"] / len(names),
        )
        rows = [f"| {name} | {seen[name, 'trains']} | {seen[name, 'packed']} |" for name in names]
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(head + "\n".join(rows) + "\n")


def every(function: Any) -> Any:
    marks = [pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.slow) for n in architectures()]
    return pytest.mark.parametrize("name", marks)(function)


def note(table: dict[tuple[str, str], str], name: str, test: str, error: BaseException | None) -> None:
    """Write down how it went; a failure that the table is to tell is none of the test."""
    reason = "yes" if error is None else reason_of(error)
    table[name, test] = reason
    if error is not None and name in ALWAYS:
        raise error


def reason_of(error: BaseException) -> str:
    """The first sentence of an error, in one cell."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if line.startswith("ValueError:")), lines[0] if lines else type(error).__name__)
    return text.removeprefix("ValueError: ").replace("|", "/")[:160]


def inputs_of(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """The row, with a picture where the model insists on one."""
    inputs: dict[str, Any] = {"input_ids": ids}
    forward = inspect.signature(model.forward).parameters
    if "pixel_values" in forward and forward["pixel_values"].default is inspect.Parameter.empty:
        size = getattr(getattr(model.config, "vision_config", None), "image_size", 16)
        inputs["pixel_values"] = torch.zeros(1, 3, size, size)
    if "mm_token_type_ids" in forward:
        inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    return inputs


@every
def test_it_is_built_trained_saved_and_loaded(name: str, tmp_path: Path, table: dict[tuple[str, str], str]) -> None:
    try:
        train_and_load(name, tmp_path)
    except Exception as error:
        note(table, name, "trains", error)
    else:
        note(table, name, "trains", None)


def train_and_load(name: str, folder: Path) -> None:
    model = build_foundation_model(tiny_config(name), init_device="cpu")
    assert all(tensor.isfinite().all() for tensor in model.parameters()), "weights that are not finite"
    config = tiny_config(name)
    config = getattr(config, "thinker_config", config)
    plain = dict(auto_class_for(config).from_config(config, dtype=torch.float32).named_buffers())
    assert all(torch.allclose(b.float(), plain[n].float()) for n, b in model.named_buffers()), "a buffer is wrong"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(24)[None] % 17 + 6
    losses = []
    for _ in range(3):
        loss = model(**inputs_of(model, ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0], f"the loss does not fall: {losses}"
    model.eval().save_pretrained(folder)
    loaded = build_foundation_model(None, folder, init_device="cpu").eval()
    with torch.no_grad():
        logits, again = (m(**inputs_of(m, ids)).logits for m in (model, loaded))
    assert torch.equal(logits, again), "transformers does not load what it saved"


@every
def test_a_packed_row_is_its_samples_alone(name: str, table: dict[tuple[str, str], str]) -> None:
    try:
        pack_and_compare(name)
    except Exception as error:
        note(table, name, "packed", error)
    else:
        note(table, name, "packed", None)


def pack_and_compare(name: str) -> None:
    loss, reference, weights = alone(name)
    model = build_foundation_model(tiny_config(name), init_device="cpu")
    model.load_state_dict(weights, strict=False)
    model = build_parallelize_model(model, init_parallel_state())
    row = pack(tokens())
    targets = row.pop("shift_labels")[0]
    del row["labels"]
    got = cross_entropy(model(**row).logits[0].float(), targets, reduction="sum") / count()
    got.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    difference, where = worst(gradients, reference)
    assert abs(got.item() / loss - 1) <= 1e-5, f"no: the loss is off by {abs(got.item() / loss - 1):.0e}"
    assert difference <= 5e-5, f"no: the gradient of {where} is off by {difference:.0e}"


def test_a_model_that_cannot_be_told_where_samples_begin_refuses_packed_rows() -> None:
    with pytest.raises(ParallelError, match=r"CpmAntForCausalLM takes neither .* Give one sample a row"):
        pack_and_compare("cpmant")


def alone(name: str) -> tuple[float, Gradients, dict[str, torch.Tensor]]:
    """Loss, gradients and weights of the untouched model, each sample alone."""
    torch.manual_seed(0)
    config = tiny_config(name)
    config = getattr(config, "thinker_config", config)
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager"}
    model: nn.Module = auto_class_for(config).from_config(config, **kwargs).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    loss = 0.0
    for sample in tokens():
        logits = model(input_ids=sample["input_ids"][None]).logits[0].float()
        one = cross_entropy(logits, sample["shift_labels"], reduction="sum") / count()
        one.backward()
        loss += one.item()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model.state_dict()


@cache
def tokens() -> list[dict[str, torch.Tensor]]:
    """Samples without the ids that models take for something else."""
    data = samples()
    for sample in data:
        sample["input_ids"] = sample["input_ids"] % 57 + 6
        targets = sample["shift_labels"]
        sample["shift_labels"] = torch.where(targets >= 0, targets % 57 + 6, targets)
    return data


def count() -> int:
    return sum(int((sample["shift_labels"] != -100).sum()) for sample in tokens())


@pytest.mark.slow
def test_nine_of_ten_train_and_most_keep_samples_apart(table: dict[tuple[str, str], str]) -> None:
    names = architectures()
    if len(table) < 2 * len(names):
        pytest.skip("the others were not run")
    trained = [name for name in names if table[name, "trains"] == "yes"]
    assert len(trained) >= 0.9 * len(names)
    apart = [name for name in trained if table[name, "packed"] == "yes"]
    assert len(apart) >= 0.95 * len(trained)
