"""A Hugging Face folder into a model of four ranks, and out of it: bytes, memory and time, against transformers.

    python benchmarks/ckpt_load.py --gigabytes 1.5 --rounds 3

A Llama of bfloat16, its matrices split by rows or by columns over four processes (FSDP2, meta device).
`load_pretrained` of slices and from rank 0, `from_pretrained` on each rank with sharding after it, and `export_hf`
alternate, each in fresh processes, the files' pages dropped from the cache before; then once more, warm. Bytes from the
disk, and bytes that were read, are those of `/proc/self/io`, summed over the ranks, in sizes of the checkpoint (mapped
files count for the first only). Memory is the growth of the peak (VmHWM) over what the process held before, of the rank
that grew most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RANK = """
import json, os, sys, time
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from veomni_ckpt import export_hf, load_pretrained
dist.init_process_group("gloo")
folder, way, target = sys.argv[1:]
config = LlamaConfig.from_pretrained(folder)

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

def io(name):
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith(name))

def by_turns(parameter):
    return Shard(1 if parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1] else 0)

def shard_it(model):
    for layer in model.model.layers:
        fully_shard(layer, shard_placement_fn=by_turns)
    return fully_shard(model, shard_placement_fn=by_turns)

def sharded():
    with torch.device("meta"):
        return shard_it(LlamaForCausalLM(config).bfloat16())

model = None if way == "from_pretrained" else sharded()
if way == "export_hf":
    load_pretrained(model, folder)
if dist.get_rank() == 0:
    for name in os.listdir(folder):
        descriptor = os.open(f"{folder}/{name}", os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
dist.barrier()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before, disk, called, begin = status("VmRSS"), io("read_bytes"), io("rchar"), time.perf_counter()
cpu = time.process_time()
def work():
    global model
    if way == "from_pretrained":
        # safetensors maps the files: bytes are read when the shards are cut out of them
        model = shard_it(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    elif way == "export_hf":
        export_hf(model, target)
    else:
        load_pretrained(model, folder, broadcast_from_rank0=way == "broadcast_from_rank0")

work()
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
shard = sum(p.to_local().nbytes for p in model.parameters()) / 2**20
own = [seconds, cpu, status("VmHWM") - before, shard, io("read_bytes") - disk, io("rchar") - called]
dist.barrier()
begin, warm_cpu = time.perf_counter(), time.process_time()
work()
own += [time.perf_counter() - begin, time.process_time() - warm_cpu]
every = [None] * dist.get_world_size()
dist.all_gather_object(every, own)
if dist.get_rank() == 0:
    print(json.dumps(every), flush=True)
dist.barrier()
dist.destroy_process_group()
"""
MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
layers = int(sys.argv[2])
config = LlamaConfig(vocab_size=8192, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
                     num_attention_heads=16, num_key_value_heads=16)
torch.set_default_dtype(torch.bfloat16)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""
WAYS = ("load_pretrained", "broadcast_from_rank0", "from_pretrained", "export_hf")


def run(folder: Path, way: str) -> list[list[float]]:
    """Of each rank: seconds, of its processor, peak and shard MB, bytes from the disk, bytes read; warm seconds."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    arguments = [str(folder / "rank.py"), str(folder / "hf"), way, str(folder / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table; write it to --json too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    layers = max(1, round((arguments.gigabytes * 1e9 - 67e6) / 103e6))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rank.py").write_text(RANK)
        subprocess.run([sys.executable, "-c", MAKE, str(folder / "hf"), str(layers)], check=True, capture_output=True)
        size = sum(file.stat().st_size for file in (folder / "hf").glob("*.safetensors"))
        seen: dict[str, list[list[list[float]]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way in WAYS:
                seen[way].append(run(folder, way))
        for way, rounds in seen.items():
            rows.append(
                {
                    "way": way,
                    "gigabytes": size / 1e9,
                    "seconds": statistics.median(max(rank[0] for rank in ranks) for ranks in rounds),
                    "processor_seconds": statistics.median(sum(rank[1] for rank in ranks) for ranks in rounds),
                    "warm_seconds": statistics.median(max(rank[6] for rank in ranks) for ranks in rounds),
                    "warm_processor_seconds": statistics.median(sum(rank[7] for rank in ranks) for ranks in rounds),
                    "peak_mb": max(rank[2] for ranks in rounds for rank in ranks),
                    "shard_mb": max(rank[3] for ranks in rounds for rank in ranks),
                    "disk_to_size": max(sum(rank[4] for rank in ranks) for ranks in rounds) / size,
                    "read_to_size": max(sum(rank[5] for rank in ranks) for ranks in rounds) / size,
                }
            )
    print("| way | cold s | of processors | warm s | of processors | peak MB | shard MB | from disk | read |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        seconds = f"{row['seconds']:.2f} | {row['processor_seconds']:.2f}"
        seconds += f" | {row['warm_seconds']:.2f} | {row['warm_processor_seconds']:.2f}"
        memory = f"{row['peak_mb']:.0f} | {row['shard_mb']:.0f}"
        print(f"| {row['way']} | {seconds} | {memory} | {row['disk_to_size']:.2f} | {row['read_to_size']:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
