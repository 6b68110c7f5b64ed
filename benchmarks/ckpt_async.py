"""How long a save holds the training loop: synchronous, asynchronous, and torch's own asynchronous save.

Ranks of gloo hold a sharded model and its AdamW state. The three ways take turns; what is given is the median over the
rounds, after one that is not counted (it allocates buffers): the seconds that the call takes on the slowest rank, and
those until the checkpoint is whole.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lengths import report, write
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from veomni_ckpt import CheckpointManager

WIDTH = 2048


def measure(rank: int, ranks: int, folder: Path, gigabytes: float, rounds: int, results: Any) -> None:
    """On one rank: every way in every round; rank 0 hands over the seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    own_group = dist.new_group(backend="gloo")
    count = max(1, round(gigabytes * 1e9 / (3 * 4 * WIDTH * WIDTH)))  # weights and two moments in float32
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)])
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    managers = {name: CheckpointManager(folder / name, keep_last=1, async_save=name == "async") for name in WAYS[:2]}

    def ours(name: str, step: int) -> Callable[[], None]:
        managers[name].save(step, model, optimizer, {"step": step})
        return managers[name].wait

    def torchs(name: str, step: int) -> Callable[[], None]:
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        target = folder / name / str(step)
        future = dcp.async_save(state, checkpoint_id=target, process_group=own_group)

        def wait() -> None:
            future.result()
            dist.barrier()
            if rank == 0:
                shutil.rmtree(target)

        return wait

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for step in range(rounds + 1):
        for name in WAYS:
            dist.barrier()
            begin = time.perf_counter()
            wait = (torchs if name == WAYS[2] else ours)(name, step)
            held = time.perf_counter() - begin
            wait()
            both = torch.tensor([held, time.perf_counter() - begin])
            dist.all_reduce(both, dist.ReduceOp.MAX)
            if step:
                seconds[name].append((both[0].item(), both[1].item()))
    for manager in managers.values():
        manager.close()
    if rank == 0:
        results.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


WAYS = ["sync", "async", "torch's async_save"]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint (default: 2)")
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        shared = (given.ranks, Path(folder), given.gigabytes, given.repeats, results)
        ranks = [context.Process(target=measure, args=(rank, *shared)) for rank in range(given.ranks)]
        for process in ranks:
            process.start()
        seconds = results.get()
        for process in ranks:
            process.join()
    held = {name: statistics.median(one for one, _ in rounds) for name, rounds in seconds.items()}
    whole = {name: statistics.median(one for _, one in rounds) for name, rounds in seconds.items()}
    ratios = {
        name: statistics.median(a / b for (a, _), (b, _) in zip(seconds[name], seconds["sync"], strict=True))
        for name in WAYS
    }
    header = ["save", "holds the loop, s", "of a synchronous save", "whole after, s"]
    rows = [[name, f"{held[name]:.3f}", f"{ratios[name]:.1%}", f"{whole[name]:.2f}"] for name in WAYS]
    report(f"{given.gigabytes:g} GB on {given.ranks} ranks", header, rows)
    write(given.json, {"seconds": seconds, "held": held, "whole": whole, "ratios": ratios})


if __name__ == "__main__":
    main()
