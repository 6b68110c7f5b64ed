"""Run a plain function on N ranks, processes that are started once and kept; each call has gloo groups of its own."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import _redistribute
    from torch.distributed.tensor._collective_utils import MeshTopoInfo
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    pipe.send(("ready", None))
    for call in count():
        job = pipe.recv()
        if job is None:
            break
        fn, args = job
        # the groups of a call end with it: each has threads, and hundreds of calls would leave thousands
        dist.init_process_group("gloo", store=dist.PrefixStore(str(call), store), rank=rank, world_size=world_size)
        try:
            answer = ("result", fn(*args))
        except BaseException:  # what fails on a rank is shown by the test, whatever it is
            answer = ("error", traceback.format_exc())
        else:
            dist.barrier()  # gloo aborts a rank whose peers have left
            dist.destroy_process_group()
            # caches keep meshes, and so do wrapped models, which are cycles: their groups' threads would slow the rest
            _clear_sharding_prop_cache()
            _redistribute.clear_redistribute_planner_cache()
            _redistribute._gen_transform_infos.cache_clear()
            MeshTopoInfo.build_from_mesh.cache_clear()
            gc.collect()
            gc.freeze()  # what is left stays, and is not looked through again
        pipe.send(answer)


class Ranks:
    """N processes; `run` calls a module-level function on each and returns their results."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, theirs), daemon=False)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(180)  # on a busy machine torch is imported slowly

    def _collect(self, timeout: float) -> list[Any]:
        """One answer of every rank; all are ended (and started anew by the next run) if one fails or is late."""
        end, waiting, results = (
            time.monotonic() + timeout,
            dict(zip(self._pipes, range(self.world_size), strict=True)),
            {},
        )
        try:
            while waiting:
                ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"ranks {sorted(waiting.values())} gave no answer within {timeout} s")
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    try:
                        kind, value = pipe.recv()
                    except EOFError as error:
                        raise AssertionError(f"rank {rank} died; its stderr is above") from error
                    if kind == "error":
                        raise AssertionError(f"rank {rank} failed:\n{value}")
                    results[rank] = value
        except BaseException:
            self.stop(kill=True)
            raise
        return [results[rank] for rank in range(self.world_size)]

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Call `fn(*args)` on every rank; `fn` and what it returns must pickle. Results in the order of ranks."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((fn, args))
        return self._collect(timeout)

    def stop(self, kill: bool = False) -> None:
        """End the processes: by asking, or at once."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if kill:
                process.kill()
            else:
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._processes, self._pipes = [], []
