"""What the meter says of a step, against one process that runs each sample alone through the plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from transformers import AutoConfig, AutoModelForCausalLM
from veomni_data import build_dataloader, build_dataset, slice_for_sequence_parallel
from veomni_models import flops_per_step, use_fused_loss
from veomni_parallel import build_parallelize_model, clip_grad_norm_, count_targets, global_sum, init_parallel_state
from veomni_recipes.meter import Meter
from veomni_recipes.progress import Progress

CONFIG = AutoConfig.for_model(
    "qwen3",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
)
MIXTURE = AutoConfig.for_model(
    "qwen3_moe",
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=4,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
)
STEPS = 3


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    for name, count in (("a", 60), ("b", 40), ("never", 5)):
        lines = [json.dumps({"length": 3 + (7 * i + len(name)) % 11, "first": i}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "mix.yaml").write_text(
        "sources: [a.jsonl, b.jsonl, never.jsonl]\nnames: [a, b, never]\n"
        "schedule:\n  - {schedule_type: const, weights: [0.5, 0.5, 0]}\n"
    )
    return tmp_path / "mix.yaml"


def encode(row: Any) -> dict[str, list[int]]:
    ids = [(5 * row["first"] + 3 * i + (row.source == "b")) % 64 for i in range(row["length"])]
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}


def build() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG)


def measure(
    mixture: Path, sizes: dict[str, int], mode: str, packing: bool, fused: bool, delay: int
) -> list[dict[str, Any]]:
    """The lines of some steps, in which nothing learns."""
    state = init_parallel_state(**sizes, device_type="cpu")
    model, progress = build(), Progress()
    if fused:
        use_fused_loss(model)
    meter = Meter(model, state, progress, delay=delay)
    model = build_parallelize_model(model, state, mode=mode)
    loader = build_dataloader(
        build_dataset(mixture, transform=encode),
        dp_rank=state.dp.get_local_rank(),
        dp_size=state.dp.size(),
        micro_batch_size=1 if packing else 3,
        global_batch_size=4 if packing else 12,
        max_seq_len=32,
        packing=packing,
        group=state.dp.get_group(),
        seed=1,
    )
    meter.watch(model, loader)
    lines: list[dict[str, Any]] = []
    for micro_batches in progress.steps(loader, STEPS):
        meter.begin(micro_batches)
        targets = global_sum(torch.tensor(count_targets(micro_batches)), state.dp)
        loss = torch.zeros(())
        for batch in micro_batches:
            batch = slice_for_sequence_parallel(batch, state.sp.get_local_rank(), state.sp.size())
            out = model(**batch, num_items_in_batch=targets, use_cache=False)
            meter.add(out)
            (out.loss * state.loss.size()).backward()
            loss += out.loss.detach()
        norm = clip_grad_norm_(model, 1.0, state)
        model.zero_grad()
        ready = meter.end(loss=global_sum(loss, state.loss), grad_norm=norm, lr=0.5)
        assert [line["step"] for line in ready] == ([progress.step - delay] if progress.step > delay else [])
        lines += ready
    lines += meter.flush()
    assert progress.tokens == sum(line["tokens"] for line in lines)
    return lines


def truth(mixture: Path, packing: bool) -> list[dict[str, Any]]:
    """Each sample alone, in float32, through the untouched model."""
    model, made = build(), []
    seen = {"a": 0, "b": 0, "never": 0}
    loader = build_dataloader(
        build_dataset(mixture, transform=encode),
        dp_rank=0,
        dp_size=1,
        micro_batch_size=4 if packing else 12,
        global_batch_size=4 if packing else 12,
        max_seq_len=32,
        packing=packing,
        collate=lambda samples: samples,
        seed=1,
    )
    for _, (samples,) in zip(range(STEPS), loader, strict=False):
        sources = [source for source, _ in loader.given_sources()[0]]
        sums, counts, flops = dict.fromkeys("ab", 0.0), dict.fromkeys("ab", 0), 0
        model.zero_grad()
        for sample, source in zip(samples, sources, strict=True):
            ids, labels = (torch.as_tensor(sample[key])[None] for key in ("input_ids", "labels"))
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=1).loss
            loss.backward()
            sums[source] += loss.item()
            counts[source] += int((labels[0, 1:] != -100).sum())
            flops += flops_per_step(build(), {"input_ids": ids})
            seen[source] += ids.numel()
        total = sum(counts.values())
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() / total
        made.append(
            {
                "loss": sum(sums.values()) / total,
                "losses_by_source": {name: sums[name] / counts[name] for name in sums},
                "targets": total,
                "tokens": sum(len(sample["input_ids"]) for sample in samples),
                "samples": len(samples),
                "grad_norm": norm,
                "flops": flops,
                "shares": {name: tokens / sum(seen.values()) for name, tokens in seen.items()},
            }
        )
    return made


def check(lines: list[dict[str, Any]], wanted: list[dict[str, Any]], ranks: int, packing: bool) -> None:
    assert len(lines) == STEPS
    for line, want in zip(lines, wanted, strict=True):
        for key in ("loss", "losses_by_source", "grad_norm"):
            assert line[key] == pytest.approx(want[key], rel=1e-5), key
        for key in ("targets", "tokens", "samples"):
            assert line[key] == want[key], key
        flops = line["tflops_per_second"] * line["seconds"] * ranks * 1e12
        assert flops >= want["flops"] * (1 - 1e-9)
        assert flops == pytest.approx(want["flops"]) or not packing  # padding is work, too
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(want["tokens"])
        assert line["shares"] == pytest.approx(want["shares"], abs=1e-6)
        assert 0 <= line["data_wait_seconds"] < line["seconds"]
        assert 0.05 < line["peak_memory_gb"] < 20
        assert line["lr"] == 0.5


@pytest.mark.parametrize(("packing", "fused", "delay"), [(True, False, 0), (True, True, 1), (False, False, 2)], ids=str)
def test_one_rank(mixture: Path, packing: bool, fused: bool, delay: int) -> None:
    check(measure(mixture, {}, "ddp", packing, fused, delay), truth(mixture, packing), 1, packing)


@pytest.mark.parametrize(
    ("sizes", "mode", "packing", "fused"),
    [
        ({}, "fsdp2", True, False),
        ({"dp_replicate": 2, "dp_shard": 1}, "ddp", False, False),
        ({}, "fsdp1", True, True),
        ({"ulysses": 2}, "fsdp2", True, False),
    ],
    ids=str,
)
def test_two_ranks(
    mixture: Path, sizes: dict[str, int], mode: str, packing: bool, fused: bool, two_ranks: Ranks
) -> None:
    lines = two_ranks.run(measure, mixture, sizes, mode, packing, fused, 1)
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    check(lines[0], truth(mixture, packing), 2, packing)


def load_of_experts(mixture: Path) -> tuple[dict[str, Any], list[list[int]]]:
    """The line of a step of a model whose experts are spread, and the tokens that its routers gave each expert."""
    state = init_parallel_state(dp_shard=2, ep=2, device_type="cpu")
    torch.manual_seed(0)
    model, progress = AutoModelForCausalLM.from_config(MIXTURE), Progress()
    chosen = [torch.zeros(4, dtype=torch.int64) for _ in range(2)]

    def count(layer: int, indices: torch.Tensor) -> None:
        chosen[layer] += torch.bincount(indices.flatten(), minlength=4)

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda _, args, out, n=number: count(n, out[-1]))
    meter = Meter(model, state, progress)
    model = build_parallelize_model(model, state, mode="fsdp2")
    loader = build_dataloader(
        build_dataset(mixture, transform=encode),
        dp_rank=state.dp.get_local_rank(),
        dp_size=2,
        micro_batch_size=1,
        global_batch_size=4,
        max_seq_len=32,
        group=state.dp.get_group(),
    )
    meter.watch(model, loader)
    lines = []
    for micro_batches in progress.steps(loader, 1):
        meter.begin(micro_batches)
        for batch in micro_batches:
            out = model(**batch, num_items_in_batch=1, use_cache=False)
            out.loss.backward()
            meter.add(out)
        lines = meter.end(loss=torch.ones(()), grad_norm=torch.ones(()), lr=0.0)
    return lines[0], [global_sum(each, state.dp).tolist() for each in chosen]


def test_the_load_of_experts_is_that_of_the_routers(mixture: Path, two_ranks: Ranks) -> None:
    (line, counts), _ = two_ranks.run(load_of_experts, mixture, timeout=200)
    assert sum(counts[0]) == sum(counts[1]) == 2 * line["tokens"]
    most = [max(layer) / (sum(layer) / 4) for layer in counts]
    assert line["expert_load"] == pytest.approx(sum(most) / 2)
    assert line["idle_experts"] == sum(layer.count(0) for layer in counts) / 8


class Scalar:
    """Stands for a model's output."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss, self.losses = loss, {"text": loss, "pictures": 2 * loss}


def test_nothing_is_read_before_the_numbers_are_asked_for(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the meta device has no numbers: to read one is an error."""
    model, progress = build(), Progress()
    state = init_parallel_state(device_type="cpu")
    loader = build_dataloader(
        build_dataset(mixture, transform=encode),
        dp_rank=0,
        dp_size=1,
        micro_batch_size=1,
        global_batch_size=2,
        max_seq_len=32,
    )
    meter = Meter(model, state, progress, delay=1)
    meter.watch(model, loader)
    monkeypatch.setattr(meter, "_device", torch.device("meta"))
    monkeypatch.setattr("veomni_recipes.meter.peak_memory", lambda device: 0)
    plain, copies = torch.Tensor.to, []

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not tensor.is_meta or args != ("cpu",):
            return plain(tensor, *args, **kwargs)
        copies.append(kwargs)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    somewhere = torch.empty((), device="meta")
    for micro_batches in progress.steps(loader, 1):
        meter.begin(micro_batches)
        for _ in micro_batches:
            meter.add(Scalar(somewhere))
        assert meter.end(loss=somewhere, grad_norm=somewhere, lr=0.0) == []
    assert copies == [{"non_blocking": True}]
