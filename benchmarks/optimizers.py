"""What each value of `train.optimizer` costs and reaches: bytes of state, time of a step, loss on real text.

    python benchmarks/optimizers.py data/fortunes [--steps 100]

- bytes: of the optimizer's state for each parameter of a Qwen3-shaped model of 3.7 million, in float32.
- step: CPU time of `optimizer.step()` on it with random gradients, over that of fused AdamW; all take turns.
- training: CPU time of a whole step (forward, backward, optimizer) of the model below, over that with fused AdamW.
- loss: nats a byte on held-out text, of a model of 0.26 million after `--steps` steps of 4 rows of 96 bytes with
  warm-up and cosine decay; the best of three peak learning rates, which is named. Muon computes in float32.

The folder has `train.jsonl` and `validation.jsonl` with lines of `{"text": ...}`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lengths import report, write
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM
from veomni_config import TrainConfig
from veomni_recipes.optimization import build_optimizer, learning_rate, set_learning_rate

OPTIMIZERS = ("adamw", "anyprecision_adamw", "adamw_8bit", "adafactor", "muon")
PEAKS = (3e-3, 1e-2, 3e-2)
ROWS, LENGTH = 4, 96


def qwen3(width: int, layers: int, vocabulary: int) -> nn.Module:
    """A Qwen3-shaped model with drawn weights, the same in every call."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        vocab_size=vocabulary,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


def optimizer_of(model: nn.Module, kind: str, lr: float) -> torch.optim.Optimizer:
    """As a recipe makes it."""
    return build_optimizer(model, lr=lr, weight_decay=0.1, optimizer=kind, muon={"ns_dtype": "float32"})


def bytes_of(tensor: torch.Tensor) -> int:
    """Also of a tensor that is made of others, as quantised ones are."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def measure_steps(repeats: int) -> dict[str, tuple[float, float]]:
    """Bytes of state a parameter, and CPU seconds of a step, by optimizer."""
    models = {kind: qwen3(256, 4, 1024) for kind in OPTIMIZERS}
    optimizers = {kind: optimizer_of(model, kind, 1e-4) for kind, model in models.items()}
    gradients = [torch.randn(p.shape) for p in models["adamw"].parameters()]
    seconds: dict[str, list[float]] = {kind: [] for kind in OPTIMIZERS}
    for model in models.values():
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
    for _ in range(repeats + 1):
        for kind, optimizer in optimizers.items():
            began = time.process_time()
            optimizer.step()
            seconds[kind].append(time.process_time() - began)
    parameters = sum(p.numel() for p in models["adamw"].parameters())
    found = {}
    for kind, optimizer in optimizers.items():
        size = sum(bytes_of(value) for state in optimizer.state.values() for value in state.values())
        found[kind] = size / parameters, statistics.median(seconds[kind][1:])
    return found


def read(path: Path) -> torch.Tensor:
    """All bytes of the texts, each text ended by a zero: int64."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    return torch.frombuffer(bytearray("\0".join(texts).encode()), dtype=torch.uint8).long()


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Nats a byte of rows [B, S + 1]."""
    logits = model(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(kind: str, lr: float, steps: int, text: torch.Tensor, held_out: torch.Tensor) -> tuple[float, float]:
    """The loss on the held-out text, and the median of the CPU seconds of a step."""
    model = qwen3(96, 2, 256)
    optimizer = optimizer_of(model, kind, lr)
    schedule = TrainConfig(output_dir=Path("unused"), lr=lr, lr_min=0, lr_warmup_ratio=0.1, lr_decay_style="cosine")
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(text) - LENGTH - 1, (ROWS,), generator=generator)
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        began = time.process_time()
        set_learning_rate(optimizer, learning_rate(step, steps, schedule))
        loss_of(model, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
    with torch.no_grad():
        rows = held_out[: len(held_out) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)[:128]
        return loss_of(model, rows).item(), statistics.median(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    costs = measure_steps(options.repeats)
    print(costs, file=sys.stderr)
    text, held_out = read(options.folder / "train.jsonl"), read(options.folder / "validation.jsonl")
    figures: list[Any] = []
    usual = None
    for kind in OPTIMIZERS:
        runs = [(*train(kind, lr, options.steps, text, held_out), lr) for lr in PEAKS]
        loss, _, lr = min(runs)
        seconds = statistics.median(run[1] for run in runs)
        usual = usual or seconds
        size, step = costs[kind]
        print(f"{kind}: " + ", ".join(f"{loss:.3f} at {lr:g}" for loss, _, lr in runs), file=sys.stderr)
        figures.append((kind, size, step / costs["adamw"][1], seconds / usual, loss, lr))
    report(
        f"{len(PEAKS)} runs of {options.steps} steps of each",
        ("optimizer", "bytes a parameter", "step", "training", "loss", "at lr"),
        [(kind, *(f"{value:.2f}" for value in row[:3]), f"{row[3]:.3f}", f"{row[4]:g}") for kind, *row in figures],
    )
    write(options.json, {"optimizers": figures})


if __name__ == "__main__":
    main()
