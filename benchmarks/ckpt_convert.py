"""How fast a DCP folder becomes a Hugging Face folder, and how fast its metadata is read: tables and JSON.

    python benchmarks/ckpt_convert.py --gigabytes 1.5 --rounds 5 --json result.json
    python benchmarks/ckpt_convert.py --metadata 10000x64 --metadata 100000x64

The ways alternate within each round, page cache warm, each in a process of its own (Python's start included), without
fsync on any side. Medians of the rounds, and each round's ratio to `cp -r` of the same folder. torch's ways write the
same tensors: `dcp_to_torch_save` + `safetensors`, and the consolidation of HuggingFaceStorageWriter's shards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

# 4 ranks; bfloat16 matrices split by rows and by columns in turn, as `shared/accept/06_ckpt.py` has them
SAVE = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
folder, layers, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
dist.init_process_group("gloo"); mesh = init_device_mesh("cpu", (4,)); torch.manual_seed(dist.get_rank())
state = {}
for i in range(layers):
    for j in range(5):
        local = torch.randn(2048, 768) if j % 2 else torch.randn(512, 3072)
        state[f"model.layers.{i}.w{j}.weight"] = DTensor.from_local(local.to(dtype), mesh, [Shard(j % 2)])
dcp.save({"model": state}, checkpoint_id=folder + "/dcp")
if sys.argv[4] == "yes":
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(folder + "/shards", save_distributed=True))
dist.destroy_process_group()
"""
TORCH_SAVE = """
import sys, torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2] + ".pt")
save_file(torch.load(sys.argv[2] + ".pt")["model"], sys.argv[2])
"""
CONSOLIDATE = """
import glob, sys
from safetensors import safe_open
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
with safe_open(glob.glob(sys.argv[1] + "/*.safetensors")[0], framework="pt") as one:
    names = dict.fromkeys(one.keys(), 1)
consolidate_safetensors_files(sys.argv[1], sys.argv[2], names)
"""
READ_METADATA = """
import resource, sys, time
begin = time.perf_counter()
from veomni_ckpt import inspect
found = inspect(sys.argv[1])
used = resource.getrusage(resource.RUSAGE_SELF)
print(len(found.tensors), time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss // 1024)
"""


def measure(command: list[str]) -> tuple[float, float, int]:
    """Seconds, seconds of the processor, and peak memory in MB, of a command in a process of its own."""
    probe = (
        "import resource, subprocess, sys, time; begin = time.perf_counter()\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss // 1024)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", probe, *command], capture_output=True, text=True, check=True, env=environment
    )
    seconds, processor, peak = run.stdout.split()
    return float(seconds), float(processor), int(peak)


def ways(folder: Path, dtype: str, with_torch: bool) -> dict[str, Callable[[Path], list[str]]]:
    """Name of each way -> the command that writes to a path."""
    tool = str(Path(sys.executable).parent / "veomni-ckpt")
    source = str(folder / "dcp")
    found: dict[str, Callable[[Path], list[str]]] = {
        "cp -r": lambda target: ["cp", "-r", source, str(target)],
        "veomni-ckpt to-hf": lambda target: [tool, "to-hf", source, str(target), "--quiet"],
    }
    if dtype == "float32":
        found["veomni-ckpt to-hf --dtype bf16"] = lambda target: [*found["veomni-ckpt to-hf"](target), "--dtype=bf16"]
    if with_torch:
        found["dcp_to_torch_save + safetensors"] = lambda target: [
            sys.executable,
            "-c",
            TORCH_SAVE,
            source,
            str(target),
        ]
        shards = str(folder / "shards")
        found["torch's consolidation of shards"] = lambda target: [
            sys.executable,
            "-c",
            CONSOLIDATE,
            shards,
            str(target),
        ]
    return found


def convert(gigabytes: float, rounds: int, dtype: str, with_torch: bool) -> list[dict[str, Any]]:
    """One row for each way."""
    layers = max(1, round(gigabytes * 1e9 / (5 * 2048 * 3072 * (4 if dtype == "float32" else 2))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "save.py").write_text(SAVE)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
        arguments = [str(folder / "save.py"), name, str(layers), dtype, "yes" if with_torch else "no"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launch, *arguments], check=True, env=environment, capture_output=True)
        commands = ways(folder, dtype, with_torch)
        seconds: dict[str, list[float]] = {way: [] for way in commands}
        processor: dict[str, list[float]] = {way: [] for way in commands}
        peaks: dict[str, int] = dict.fromkeys(commands, 0)
        for number in range(rounds + 1):
            for way, command in commands.items():
                target = folder / "target"
                if "consolidation" in way:
                    target.mkdir()
                taken, worked, peak = measure(command(target))
                shutil.rmtree(target, ignore_errors=True)
                for left in folder.glob("target*"):
                    left.unlink()
                if number:  # the first round warms the page cache
                    seconds[way].append(taken)
                    processor[way].append(worked)
                    peaks[way] = max(peaks[way], peak)
    base = seconds["cp -r"]
    return [
        {
            "way": way,
            "dtype": dtype,
            "gigabytes": gigabytes,
            "seconds": statistics.median(taken),
            "processor_seconds": statistics.median(processor[way]),
            "to_cp": statistics.median(one / other for one, other in zip(taken, base, strict=True)),
            "to_cp_without_start": statistics.median(
                (one - 0.3) / other for one, other in zip(taken, base, strict=True)
            ),
            "peak_mb": peaks[way],
        }
        for way, taken in seconds.items()
    ]


def read_metadata(tensors: int, shards: int) -> dict[str, Any]:
    """`inspect` of metadata alone; the data files have the right sizes and no blocks on the disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / ".metadata").open("wb") as stream:
            write_metadata(stream, tensors, shards)
        for shard in range(shards):
            (folder / f"__{shard}_0.distcp").touch()
            os.truncate(folder / f"__{shard}_0.distcp", tensors * ITEM_BYTES)
        command = ["sh", "-c", '"$@"; :', "sh", sys.executable, "-c", READ_METADATA, name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        count, seconds, processor, peak = run.stdout.split()
        assert int(count) == tensors
        size = (folder / ".metadata").stat().st_size
    return {
        "tensors": tensors,
        "shards": shards,
        "file_mb": size / 1e6,
        "seconds": float(seconds),
        "processor_seconds": float(processor),
        "peak_mb": int(peak),
    }


ITEM_BYTES = 460_000


def write_metadata(stream: BinaryIO, tensors: int, shards: int) -> None:
    """Metadata of `tensors` bfloat16 matrices in `shards` row blocks, byte for byte in the way of Python's pickler.

    Made without the objects, which would take 12 GB for 100,000 x 64.
    """
    memo: dict[str, int] = {}
    count = 0

    def remember() -> bytes:
        nonlocal count
        count += 1
        return b"\x94"

    def text(value: str, fresh: bool = False) -> bytes:
        if value in memo and not fresh:
            return get(memo[value])
        memo[value] = count
        encoded = value.encode()
        return b"\x8c" + bytes([len(encoded)]) + encoded + remember()

    def get(number: int) -> bytes:
        return b"h" + bytes([number]) if number < 256 else b"j" + number.to_bytes(4, "little")

    def cls(module: str, name: str) -> bytes:
        key = f"{module} {name}"
        if key in memo:
            return get(memo[key])
        asked = text(module) + text(name) + b"\x93"
        memo[key] = count
        return asked + remember()

    def number(value: int) -> bytes:
        if value < 2**8:
            return b"K" + bytes([value])
        if value < 2**16:
            return b"M" + value.to_bytes(2, "little")
        if value < 2**31:
            return b"J" + value.to_bytes(4, "little")
        return b"\x8a\x06" + value.to_bytes(6, "little")

    def size(*values: int) -> bytes:
        pair = cls("torch", "Size") + number(values[0]) + number(values[1]) + b"\x86" + remember()
        return pair + b"\x85" + remember() + b"R" + remember()

    def instance(name: str, module: str = "torch.distributed.checkpoint.metadata") -> bytes:
        return cls(module, name) + b")\x81" + remember()

    def state() -> bytes:
        return b"}" + remember() + b"("

    def batches(parts: Iterator[bytes], close: bytes) -> None:
        stream.write(b"(")
        for position, part in enumerate(parts):
            if position and position % 1000 == 0:
                stream.write(close + b"(")
            stream.write(part)
        stream.write(close)

    def chunk(shard: int) -> bytes:
        made = instance("ChunkStorageMetadata") + state() + text("offsets")
        return made + size(112 * shard, 0) + text("sizes") + size(112, 2048) + b"ub"

    def properties() -> bytes:
        made = instance("TensorProperties") + b"(" + cls("torch", "bfloat16")
        made += (
            cls("torch.serialization", "_get_layout") + text("torch.strided") + b"\x85" + remember() + b"R" + remember()
        )
        made += b"\x89" + cls("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
        return made + b"K\x00\x85" + remember() + b"R" + remember() + b"\x89t" + remember() + b"b"

    names = [f"model.layers.{index // 100}.mlp.experts.{index % 100}.gate_proj.weight" for index in range(tensors)]

    def entry(name: str) -> bytes:
        made = text(name) + instance("TensorStorageMetadata") + state() + text("properties") + properties()
        made += text("size") + size(112 * shards, 2048) + text("chunks") + b"]" + remember() + b"("
        return made + b"".join(chunk(shard) for shard in range(shards)) + b"eub"

    def place(shard: int, index: int) -> bytes:
        # each rank's names are texts of their own
        made = instance("MetadataIndex") + state() + text("fqn") + text(names[index], fresh=True) + text("index")
        made += number(shard) + text("offset") + size(112 * shard, 0) + b"ub"
        made += instance("_StorageInfo", "torch.distributed.checkpoint.filesystem") + state() + text("relative_path")
        made += text(f"__{shard}_0.distcp", fresh=index == 0) + text("offset") + number(ITEM_BYTES * index)
        return made + text("length") + number(ITEM_BYTES) + b"ub"

    stream.write(b"\x80\x04" + instance("Metadata") + state() + text("state_dict_metadata") + b"}" + remember())
    batches((entry(name) for name in names), b"u")
    stream.write(text("planner_data") + b"}" + remember())
    batches((text(name) + text("model") + text(name[6:], fresh=True) + b"\x86" + remember() for name in names), b"u")
    stream.write(text("storage_data") + b"}" + remember())
    batches((place(shard, index) for shard in range(shards) for index in range(tensors)), b"u")
    stream.write(b"ub.")


def main() -> None:
    """Print the tables; write them to --json too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of the checkpoint; 0: no conversion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], action="append")
    parser.add_argument("--without-torch", action="store_true", help="leave out torch's slow ways")
    parser.add_argument("--metadata", action="append", default=[], metavar="TENSORSxSHARDS")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"convert": [], "metadata": [], "cores": os.cpu_count(), "load": os.getloadavg()}
    if arguments.gigabytes:
        for dtype in arguments.dtype or ["bfloat16", "float32"]:
            with_torch = not arguments.without_torch and dtype == "bfloat16"
            rows = convert(arguments.gigabytes, arguments.rounds, dtype, with_torch)
            result["convert"] += rows
            print(f"\n{arguments.gigabytes} GB {dtype}, medians of {arguments.rounds} rounds")
            print("| way | seconds | of the processor | to cp -r | (seconds - 0.3) to cp -r | peak MB |")
            print("|---|---|---|---|---|---|")
            for row in rows:
                figures = f"{row['seconds']:.2f} | {row['processor_seconds']:.2f} | {row['to_cp']:.2f}"
                print(f"| {row['way']} | {figures} | {row['to_cp_without_start']:.2f} | {row['peak_mb']} |")
    if arguments.metadata:
        print("\n| tensors x shards | file MB | inspect, seconds | of the processor | peak MB |\n|---|---|---|---|---|")
    for text in arguments.metadata:
        begin = time.perf_counter()
        tensors, shards = map(int, text.split("x"))
        row = read_metadata(tensors, shards)
        result["metadata"].append(row)
        taken = f"{row['seconds']:.1f} | {row['processor_seconds']:.1f}"
        print(f"| {text} | {row['file_mb']:.0f} | {taken} | {row['peak_mb']} |", flush=True)
        print(f"(made and read in {time.perf_counter() - begin:.0f} s)", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
