"""`veomni doctor`: what this machine has, what a run will use of it, and what commonly goes wrong."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

_PACKAGES: tuple[str, ...] = (
    "torch",
    "transformers",
    "datasets",
    "torchdata",
    "safetensors",
    "peft",
    "diffusers",
    "torchao",
)
_PACKAGES += ("flash-attn", "liger-kernel", "tensorboard", "wandb", "trackio", "torchcodec", "av", "soundfile")
_SIZES = (1 << 16, 1 << 20, 1 << 24)  # bytes


def main() -> int:
    """Print everything; returns 1 if something will not work."""
    console = Console(width=110, highlight=False)
    console.print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    console.print(_two_columns("package", "version", [(name, _version(name)) for name in _PACKAGES]))
    console.print(_two_columns("device", "", devices()))
    console.print(_two_columns("kernel", "used here", kernels()))
    table = Table("collective", *(f"{size / 1e6:.2g} MB" for size in _SIZES), box=None, pad_edge=False)
    for name, rates in bandwidths(2).items():
        table.add_row(name, *(f"{rate / 1e9:.2f} GB/s" for rate in rates))
    console.print(table)
    console.print(f"(2 ranks of {_backend()} on this machine; bytes of one rank's tensor a second)")
    found = list(mistakes())
    for text in found:
        console.print(f"- {text}")
    console.print("nothing that commonly goes wrong was found" if not found else f"{len(found)} to look at")
    return 0


def _two_columns(first: str, second: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(first, second, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[tuple[str, str]]:
    """The processors and accelerators, with their memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    found = [("cpu", f"{os.cpu_count()} cores, {memory:.0f} GB, bfloat16 {_bfloat16()}")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        module = torch.get_device_module(kind)
        for index in range(torch.accelerator.device_count()):
            properties = module.get_device_properties(index)
            found.append((f"{kind}:{index}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"))
    return found


def _bfloat16() -> str:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    return "by AMX" if "amx_bf16" in flags else "by AVX-512" if "avx512_bf16" in flags else "emulated"


def kernels() -> list[tuple[str, str]]:
    """What `auto` stands for on this machine."""
    from veomni_models.foundation import attention_for

    return [
        ("attention (model.attn_implementation: auto)", str(attention_for("auto"))),
        ("experts (model.moe_implementation: fused)", "grouped_mm"),
        ("loss (train.enable_fused_loss)", "chunked, without logits of a row"),
        ("collectives", _backend()),
    ]


def _backend() -> str:
    if not torch.accelerator.is_available():
        return "gloo"
    return dist.get_default_backend_for_device(torch.accelerator.current_accelerator() or "cpu")


def bandwidths(ranks: int) -> dict[str, list[float]]:
    """Bytes a second of all-reduce, all-gather and all-to-all over processes of this machine, for each of `_SIZES`."""
    if _backend() != "gloo" and torch.accelerator.device_count() < ranks:
        return {}
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    store = Path(os.environ.get("TMPDIR", "/tmp")) / f"veomni-doctor-{os.getpid()}"
    processes = [context.Process(target=_measure, args=(rank, ranks, str(store), queue)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    store.unlink(missing_ok=True)
    return {} if queue.empty() else queue.get()


def _measure(rank: int, ranks: int, store: str, queue: Any) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if _backend() != "gloo":
        device = torch.device(torch.accelerator.current_accelerator() or "cpu", rank)
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(_backend(), init_method=f"file://{store}", rank=rank, world_size=ranks)
    rates: dict[str, list[float]] = {}
    for name in ("all_reduce", "all_gather", "all_to_all"):
        for size in _SIZES:
            rates.setdefault(name, []).append(size / _seconds(name, torch.ones(size // 4, device=device), ranks))
    if rank == 0:
        queue.put(rates)
    dist.destroy_process_group()


def _seconds(name: str, tensor: torch.Tensor, ranks: int, repeats: int = 5) -> float:
    out = torch.empty(tensor.numel() * ranks, device=tensor.device)
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        if name == "all_reduce":
            dist.all_reduce(tensor)
        elif name == "all_gather":
            dist.all_gather_single(out, tensor)
        else:
            dist.all_to_all_single(out[: tensor.numel()], tensor)
        if tensor.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]


def mistakes() -> Iterator[str]:
    """Sentences about what is known to go wrong on a machine like this one."""
    threads, cores = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    processes = os.environ.get("NPROC_PER_NODE")
    if threads and processes and processes.isdigit() and int(threads) * int(processes) > cores:
        yield (
            f"OMP_NUM_THREADS={threads} for NPROC_PER_NODE={processes} processes is more than the {cores} cores: "
            f"they will wait for each other; leave OMP_NUM_THREADS unset, veomni run divides the cores"
        )
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    if free < 20:
        yield f"{free:.0f} GB are free in {Path.cwd()}: checkpoints hold 12 bytes a parameter"
    if Path("/dev/shm").is_dir() and (shared := shutil.disk_usage("/dev/shm").total / 1e9) < 1:
        yield f"/dev/shm has {shared:.1f} GB, too little: through it the loader's workers pass batches"
    if sys.version_info >= (3, 14):
        yield "Python 3.14 and later are not tested with all packages"
    if torch.accelerator.is_available() and _version("flash-attn") == "not installed":
        yield "flash-attn is not installed: packed rows are computed segment by segment, which is slower on a GPU"
    if not torch.accelerator.is_available() and shutil.which("nvidia-smi"):
        yield "there is an NVIDIA GPU, but this torch does not see it: install a build for CUDA"
    for name in ("MASTER_ADDR", "NODE_RANK"):
        if os.environ.get("NNODES", "1") != "1" and name not in os.environ:
            yield f"NNODES={os.environ['NNODES']}, but {name} is not set: nodes will not find each other"
