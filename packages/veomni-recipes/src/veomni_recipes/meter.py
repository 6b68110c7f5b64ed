"""What a run measures of each step, added up over the ranks without letting a device wait."""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from veomni_models import ModelError, flops_per_step, mfu
from veomni_models.token_losses import TokenLosses, keep_token_losses
from veomni_parallel import ParallelState, tokens_per_expert

from veomni_recipes.batch_counts import count_samples, count_targets, count_tokens
from veomni_recipes.distributed import world_size

if TYPE_CHECKING:
    from veomni_data import Batch, DataLoader

    from veomni_recipes.progress import Progress

Name = str | tuple[str, str]  # of a number, or of a group of them and one in it


class Meter:
    """The numbers of each step: made on every rank, reduced over all of them, read when they are there.

    Sums stay on the device. At the end of a step they are reduced and their copy to the host is begun, and on a device
    they are read when the next step has been handed to it, so that it never waits. Make it before the model is wrapped:

        meter = Meter(model, state, progress, recompute=cfg.train.enable_gradient_checkpointing)
        model = build_parallelize_model(model, state, ...)
        meter.watch(model, loader)
        for micro_batches in progress.steps(loader, limit):
            meter.begin(micro_batches)
            for batch in micro_batches:
                out = model(**batch)
                meter.add(out)
            lines = meter.end(loss=loss, grad_norm=grad_norm, lr=lr)
        lines = meter.flush()

    Args:
        model: not wrapped yet; what is frozen and adapters are as they stay.
        state: of the run.
        progress: whose tokens are counted.
        recompute: whether activations are computed again in backward, which counts as work.
        flops: (model, batch, recompute=...) -> operations of forward and backward; called with a copy of the model on
            the meta device.
        delay: steps after which a step's numbers are read; None: 0 on the CPU, else 1.
    """

    def __init__(
        self,
        model: nn.Module,
        state: ParallelState,
        progress: Progress,
        *,
        recompute: bool = False,
        flops: Callable[..., float] = flops_per_step,
        delay: int | None = None,
    ) -> None:
        self._state, self._progress, self._device = state, progress, state.device
        self._flops = partial(flops, _without_weights(model), recompute=recompute)
        self._delay = delay if delay is not None else int(self._device.type != "cpu")
        self._losses: TokenLosses | None = None
        self._model: nn.Module | None = None
        self._loader: DataLoader | None = None
        self._names: list[str] = []
        # ranks that share their tokens with others do not count them again
        self._counts = state.sp.get_local_rank() == 0 and state.tp.get_local_rank() == 0
        self._mine = float(state.tp.get_local_rank() == 0)
        self._pending: deque[_Pending] = deque()
        self._began = self._last = time.monotonic()
        self._new_tokens = 0

    def watch(self, model: nn.Module, loader: DataLoader) -> None:
        """From now on this wrapped model is trained on what comes from this loader."""
        self._model, self._loader = model, loader
        self._names = [*loader.counts()["tokens"]]
        if len(self._names) > 1 and self._state.tp.size() == 1:  # with tp the logits are divided
            try:
                self._losses = keep_token_losses(model)
            except ModelError:
                self._losses = None  # it has another loss than that of its tokens
        self._began = self._last = time.monotonic()

    def begin(self, micro_batches: Sequence[Batch]) -> None:
        """Count what the micro-batches of a step hold; they are still on the host, and whole rows."""
        own = float(self._counts)
        self._sums: dict[Name, float] = {
            "tokens": own * count_tokens(micro_batches),
            "targets": own * count_targets(micro_batches),
            "samples": own * sum(map(count_samples, micro_batches)),
            "flops": 0.0,
        }
        self._rows = list(micro_batches)
        self._parts: dict[str, Tensor] = {}
        self._sources: list[Tensor] = []
        self._by_source: Tensor | None = None
        assert self._loader is not None
        if len(self._names) > 1:
            counted = self._loader.counts()["tokens"]
            self._sums |= {("shares", name): own * counted[name] for name in self._names}
        if self._losses is None:
            return
        targets = torch.zeros(len(self._names), dtype=torch.float64)
        for batch, samples in zip(micro_batches, self._loader.given_sources(), strict=True):
            ids = source_of_tokens(batch, samples, self._names)
            targets.index_add_(0, ids.flatten(), (batch["shift_labels"] != -100).flatten().double())
            self._sources.append(self._slice(ids).to(self._device, non_blocking=True))
        self._sums |= {("source_targets", n): own * t for n, t in zip(self._names, targets.tolist(), strict=True)}
        self._by_source = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)

    def add(self, out: Any) -> None:
        """Take the losses of the next micro-batch out of the model's output: those of its parts, and of each source."""
        rows = self._rows.pop(0)
        if self._counts:  # counted now that the device has work
            self._sums["flops"] += self._flops(rows)
        for name, loss in (getattr(out, "losses", None) or {}).items():
            self._parts[name] = self._parts.get(name, 0) + loss.detach()
        if self._losses is not None and self._by_source is not None:
            for losses in self._losses.take():
                self._by_source.index_add_(0, self._sources.pop(0), losses.double())

    def end(self, *, loss: Tensor, grad_norm: Tensor, lr: float, **values: Any) -> list[dict[str, Any]]:
        """The step is over. Every rank calls it.

        Args:
            loss, grad_norm: scalars on the device, the same on all ranks.
            lr, values: go into the step's line of metrics as they are.

        Returns:
            The lines of metrics that are ready: of this step, or with a delay of the one before.
        """
        now, before = time.monotonic(), self._last
        self._last = now
        if self._counts:  # of micro-batches whose output was not given
            self._sums["flops"] += sum(map(self._flops, self._rows))
        equal: dict[Name, Any] = {"loss": loss, "grad_norm": grad_norm}
        equal |= self._expert_load()
        sums: dict[Name, Any] = dict(self._sums)
        sums |= {("losses", name): self._mine * part for name, part in self._parts.items()}
        if self._by_source is not None:
            sums |= {("source_losses", n): v for n, v in zip(self._names, self._by_source, strict=True)}
        most: dict[Name, Any] = {
            "peak_memory_gb": peak_memory(self._device) / 1e9,
            "data_wait_seconds": self._progress.data_wait,
        }
        on_device = torch.cat([_column(part, self._device) for part in (equal, sums, most)])
        if world_size() > 1:
            a, b = len(equal), len(equal) + len(sums)
            dist.all_reduce(on_device[a:b])
            dist.all_reduce(on_device[b:], dist.ReduceOp.MAX)
        line = {"step": self._progress.step, "epoch": self._progress.epoch, "lr": lr, "seconds": now - before, **values}
        self._pending.append(_Pending([*equal, *sums, *most], on_device, line))
        return [self._line(self._pending.popleft()) for _ in range(len(self._pending) - self._delay)]

    def flush(self) -> list[dict[str, Any]]:
        """The lines that are left, such as before a checkpoint, with which all steps before it must be told."""
        return [self._line(self._pending.popleft()) for _ in range(len(self._pending))]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks together, on average since this process began to train."""
        return self._new_tokens / max(1e-9, self._last - self._began)

    def _line(self, pending: _Pending) -> dict[str, Any]:
        values, line = pending.read(), pending.line
        seconds, tokens = line["seconds"], int(values["tokens"])
        self._progress.tokens += tokens
        self._new_tokens += tokens
        made = {
            "step": line.pop("step"),
            "epoch": line.pop("epoch"),
            "targets": int(values["targets"]),
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "lr": line.pop("lr"),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": line.pop("seconds"),
            "samples": int(values["samples"]),
            "samples_per_second": values["samples"] / seconds,
            "tflops_per_second": values["flops"] / seconds / world_size() / 1e12,
            "peak_memory_gb": values["peak_memory_gb"],
            "data_wait_seconds": values["data_wait_seconds"],
            **line,
        }
        name = torch.cuda.get_device_name() if self._device.type == "cuda" else self._device.type
        if (share := mfu(values["flops"], seconds, world_size(), name)) is not None:
            made["mfu"] = share
        if parts := _group(values, "losses"):
            made["losses"] = parts
        if seen := _group(values, "shares"):
            made["shares"] = {name: round(count / max(1.0, sum(seen.values())), 6) for name, count in seen.items()}
        totals, counts = _group(values, "source_losses"), _group(values, "source_targets")
        if by_source := {n: totals[n] / counts[n] for n in totals if counts[n]}:
            made["losses_by_source"] = by_source
        return made | {key: values[key] for key in ("expert_load", "idle_experts") if key in values}

    def _expert_load(self) -> dict[Name, Any]:
        """Of all layers with experts: the busiest expert's tokens over the mean, and the share that got none."""
        loads = tokens_per_expert(self._model, self._state) if self._model is not None else {}
        if not loads:
            return {}
        # models may have layers of different numbers of experts
        most = torch.stack([load.max() / load.double().mean().clamp(min=1) for load in loads.values()])
        idle = torch.stack([(load == 0).double().mean() for load in loads.values()])
        return {"expert_load": most.mean(), "idle_experts": idle.mean()}

    def _slice(self, ids: Tensor) -> Tensor:
        """Of [1, T] or [B, S] what this rank's model computes losses of, flat."""
        ranks = self._state.sp.size()
        if ranks == 1:
            return ids.flatten()
        padded = nn.functional.pad(ids.flatten(), (0, -ids.numel() % ranks))
        return padded.chunk(ranks)[self._state.sp.get_local_rank()]


class _Pending:
    """Numbers on their way to the host."""

    def __init__(self, names: list[Name], on_device: Tensor, line: dict[str, Any]) -> None:
        self.line = line
        self._names = names
        self._values = on_device.to("cpu", non_blocking=True)
        self._there: torch.Event | None = None
        if on_device.device.type not in ("cpu", "meta"):
            self._there = torch.Event(device=on_device.device)
            self._there.record()

    def read(self) -> dict[Name, float]:
        """The numbers; waits until they are there."""
        if self._there is not None:
            self._there.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


def source_of_tokens(batch: Batch, samples: Sequence[tuple[str, int]], names: Sequence[str]) -> Tensor:
    """The number of the source that each token is of, int64 like `input_ids`; padding counts as of the first.

    Args:
        samples: source and tokens of each sample, in the order in which the batch holds them.
        names: of all sources.
    """
    ids = torch.zeros_like(batch["input_ids"])
    numbers = [names.index(source) for source, _ in samples]
    if "attention_mask" in batch:
        for row, number in enumerate(numbers):
            ids[row] = number
        return ids
    ends = [0, *accumulate(tokens for _, tokens in samples)]
    for number, start, end in zip(numbers, ends, ends[1:], strict=False):
        ids[0, start:end] = number
    return ids


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had: on its device, or without one of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type != "cpu" and hasattr(torch.accelerator, "max_memory_allocated"):
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, for its structure."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def _column(values: Mapping[Name, Any], device: torch.device) -> Tensor:
    """[n] float64 of numbers and scalars of the device, without reading one of them."""
    if not values:
        return torch.zeros(0, dtype=torch.float64, device=device)
    host = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values.values()], dtype=torch.float64)
    column = host.to(device, non_blocking=True)
    tensors = {i: v for i, v in enumerate(values.values()) if isinstance(v, Tensor)}
    if tensors:
        places = torch.tensor([*tensors]).to(device, non_blocking=True)
        column = column.index_copy(0, places, torch.stack([v.detach().to(device).double() for v in tensors.values()]))
    return column


def _group(values: Mapping[Name, float], group: str) -> dict[str, float]:
    """The values of a group, such as the losses of all sources."""
    return {name[1]: value for name, value in values.items() if isinstance(name, tuple) and name[0] == group}
