"""A trace of some steps for Perfetto or chrome://tracing, and a snapshot of a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from veomni_config import TrainConfig

from veomni_recipes.distributed import rank


@contextmanager
def traced(train: TrainConfig, folder: Path, done: int) -> Iterator[Callable[[], None]]:
    """Trace steps `train.profile_start_step` up to before `train.profile_end_step`; call what it gives after each step.

    Writes `rank_R_steps_A_to_B.json.gz` into `train.profile_trace_dir`, and on CUDA with `train.profile_profile_memory`
    `rank_R_steps_A_to_B.memory.pickle` for pytorch.org/memory_viz. The step before the first is traced too, to warm up,
    and left out.

    Args:
        folder: of the run, from which a trace folder that is not absolute is meant.
        done: steps of the run that are made already; if the steps to trace are among them, nothing is traced.
    """
    first, end = max(train.profile_start_step, 1, done + 1), train.profile_end_step
    if not train.enable_profiling or first >= end or (train.profile_rank0_only and rank() != 0):
        yield _nothing
        return
    traces = folder / train.profile_trace_dir
    traces.mkdir(parents=True, exist_ok=True)
    name = f"rank_{rank()}_steps_{first}_to_{end - 1}"
    warmup = min(1, first - done - 1)
    snapshot = train.profile_profile_memory and torch.cuda.is_available()

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(traces / f"{name}.json.gz"))
        if snapshot:
            torch.cuda.memory._dump_snapshot(str(traces / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    if snapshot:
        torch.cuda.memory._record_memory_history()
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
        schedule=schedule(wait=first - done - 1 - warmup, warmup=warmup, active=end - first, repeat=1),
        on_trace_ready=write,
        record_shapes=train.profile_record_shapes,
        profile_memory=train.profile_profile_memory,
        with_stack=train.profile_with_stack,
    ) as profiler:
        yield profiler.step


def _nothing() -> None:
    return
