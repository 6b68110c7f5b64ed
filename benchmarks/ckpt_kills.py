"""SIGKILL at random moments of a run: whatever was being done, it goes on with the very numbers of an undisturbed one.

Ranks of gloo train a small sharded model with dropout on shuffled samples and save all of that often. They are killed
at a random moment, started again, load "auto", and go on. Every loss that any of them ever computed is held against the
undisturbed curve, bit by bit. A kill counts as one during a save if it left an unfinished folder behind, as one during
steps if the ranks had loaded and it left none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lengths import report, write
from torch import nn
from torch.distributed.fsdp import fully_shard
from veomni_ckpt import CheckpointManager

SAMPLES, BATCH, WIDTH, SAVE_EVERY = 64, 4, 32, 5


def gathered_rng() -> list[torch.Tensor]:
    """The random state of every rank: `extra_state` is the same on all."""
    states = [torch.empty_like(torch.get_rng_state()) for _ in range(dist.get_world_size())]
    dist.all_gather(states, torch.get_rng_state())
    return states


def train(rank: int, world_size: int, folder: Path, attempt: int, steps: int, async_save: bool, events: Any) -> None:
    """One life of one rank: load, then train to the end; rank 0 appends each step's loss to `losses.jsonl`."""
    torch.set_num_threads(1)
    # the rank that is killed last complains of the other
    os.dup2(os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    store = f"file://{folder}/store_{attempt}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    data = torch.randn(SAMPLES, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.GELU(), nn.Linear(WIDTH, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(100 + rank)
    manager = CheckpointManager(folder / "checkpoints", keep_last=2, async_save=async_save)
    ready, loaded = events
    ready.set()
    step, order, at = 0, torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(7)), 0
    saved = manager.load("auto", model, optimizer)
    if saved is not None:
        step, order, at = saved["step"], saved["order"], saved["at"]
        torch.set_rng_state(saved["rng"][rank])
    log = (folder / "losses.jsonl").open("a", encoding="utf-8") if rank == 0 else None
    loaded.set()
    while step < steps:
        if at + BATCH * world_size > SAMPLES:  # a new epoch: an order that follows from the last one
            order, at = order[torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))], 0
        own = data[order[at + BATCH * rank : at + BATCH * (rank + 1)]]
        at += BATCH * world_size
        loss = model(own).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach())
        step += 1
        if log is not None:
            line = {"attempt": attempt, "step": step, "loss": loss.item().hex(), "time": time.time()}
            log.write(json.dumps(line) + "\n")
            log.flush()
        if step % SAVE_EVERY == 0:
            state = {"step": step, "order": order, "at": at, "rng": gathered_rng()}
            manager.save(step, model, optimizer, state)
    manager.close()
    dist.destroy_process_group()


@dataclass
class Kills:
    """What was done to runs, and what came of it."""

    during_saves: int = 0
    during_steps: int = 0
    during_loads: int = 0
    losses_compared: int = 0
    runs_finished: int = 0


def read_losses(folder: Path) -> list[dict[str, Any]]:
    """Lines that were written whole."""
    path = folder / "losses.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def hidden_in(run: Path) -> set[tuple[str, int, float]]:
    """Folders that a save has not finished, and when."""
    paths = list((run / "checkpoints").glob(".global_step_*"))
    return {(path.name, path.stat().st_ino, path.stat().st_mtime) for path in paths}


def seconds_of_a_save(lines: list[dict[str, Any]]) -> float:
    """The median time from the step before a save to the step after it."""
    pairs = [(a, b) for a, b in itertools.pairwise(lines) if a["step"] % SAVE_EVERY == 0 and b["step"] == a["step"] + 1]
    return statistics.median(b["time"] - a["time"] for a, b in pairs)


def wait_for_steps(run: Path, count: int, ranks: list[Any]) -> None:
    """Until so many lines are logged, or all ranks have ended."""
    while len(read_losses(run)) < count and any(process.is_alive() for process in ranks):
        time.sleep(0.005)


def kill_runs(
    folder: Path,
    *,
    during_saves: int,
    during_steps: int,
    world_size: int = 2,
    steps: int = 60,
    async_save: bool = False,
    seed: int = 0,
    progress: Callable[[Kills], None] = lambda kills: None,
) -> Kills:
    """Kill until as many kills of each kind were counted; runs that end are compared and begun anew.

    Args:
        folder: empty; runs are kept in it.

    Raises:
        AssertionError: a life did not load, or a loss is not that of the undisturbed run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "veomni_ckpt.manager", "torch._dynamo", "torch.distributed.fsdp"])
    moments = random.Random(seed)
    kills = Kills()
    attempts = iter(range(10**9))

    def start(run: Path) -> tuple[list[Any], int, Any]:
        events, attempt = (context.Event(), context.Event()), next(attempts)
        shared = (world_size, run, attempt, steps, async_save, events)
        ranks = [context.Process(target=train, args=(rank, *shared), daemon=True) for rank in range(world_size)]
        for process in ranks:
            process.start()
        return ranks, attempt, events

    undisturbed = folder / "undisturbed"
    undisturbed.mkdir(parents=True)
    ranks, _, _ = start(undisturbed)
    for process in ranks:
        process.join()
    expected = {line["step"]: line["loss"] for line in read_losses(undisturbed)}
    assert len(expected) == steps
    pause = seconds_of_a_save(read_losses(undisturbed))

    number = 0
    while kills.during_saves < during_saves or kills.during_steps < during_steps:
        number += 1
        run = folder / f"run_{number}"
        run.mkdir()
        finished = False
        while not finished:
            before, unfinished = len(read_losses(run)), hidden_in(run)
            ranks, attempt, (ready, loaded) = start(run)
            assert ready.wait(120), "the ranks did not start"
            if moments.random() < 0.9:
                # in a life that has got somewhere, amid a step or a save; else in its beginning
                wait_for_steps(run, before + moments.randrange(2 * SAVE_EVERY), ranks)
                if moments.random() < 0.6:
                    while len(lines := read_losses(run)) and lines[-1]["step"] % SAVE_EVERY:
                        wait_for_steps(run, len(lines) + 1, ranks)
            time.sleep(moments.uniform(0, pause))
            finished = all(process.exitcode == 0 for process in ranks)
            enough = kills.during_saves >= during_saves and kills.during_steps >= during_steps
            if enough:  # this life may end, and so shows that the last kill did no harm either
                for process in ranks:
                    process.join()
                finished = True
            broken = [process.exitcode for process in ranks if process.exitcode not in (None, 0)]
            moments.shuffle(ranks)
            for process in ranks:
                process.kill()
                time.sleep(moments.uniform(0, 0.01))
            for process in ranks:
                process.join()
            assert not broken, f"life {attempt} ended by itself: {(run / 'rank_0.log').read_text()[-2000:]}"
            if not finished:
                saving = bool(hidden_in(run) - unfinished)
                kills.during_saves += saving
                kills.during_steps += not saving and loaded.is_set()
                kills.during_loads += not saving and not loaded.is_set()
            lines = read_losses(run)
            for line in lines[before:]:
                kills.losses_compared += 1
                assert line["loss"] == expected[line["step"]], f"life {attempt} differs at step {line['step']}"
            progress(kills)
        steps_seen = {line["step"] for line in read_losses(run)}
        assert steps_seen == set(expected), "a run ended without some of its steps"
        assert read_losses(run)[-1]["step"] == steps
        kills.runs_finished += 1
        shutil.rmtree(run)
    return kills


def main() -> None:
    """Kill, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=100, help="kills during saves (default: 100)")
    parser.add_argument("--steps", type=int, default=50, help="kills between them (default: 50)")
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks (default: 2)")
    parser.add_argument("--run-steps", type=int, default=60, help="steps of a run (default: 60)")
    parser.add_argument("--async-save", action="store_true", help="save in the background")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", type=Path, help="write the counts there")
    given = parser.parse_args()

    def show(kills: Kills) -> None:
        print(f"\r{kills.during_saves} during saves, {kills.during_steps} during steps ", end="", file=sys.stderr)

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kills = kill_runs(
            Path(folder),
            during_saves=given.saves,
            during_steps=given.steps,
            world_size=given.ranks,
            steps=given.run_steps,
            async_save=given.async_save,
            seed=given.seed,
            progress=show,
        )
    print(file=sys.stderr)
    minutes = (time.monotonic() - begin) / 60
    header = ["kills during saves", "steps", "loads", "losses compared, all bitwise equal", "runs finished", "minutes"]
    counts = (kills.during_saves, kills.during_steps, kills.during_loads, kills.losses_compared, kills.runs_finished)
    report(f"{given.ranks} ranks", header, [[*(f"{count:,}" for count in counts), f"{minutes:.1f}"]])
    write(given.json, {**vars(kills), "minutes": minutes})


if __name__ == "__main__":
    main()
