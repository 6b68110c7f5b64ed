"""Checkpoints as torch's writers and other trainers leave them, saved by four ranks, and the tensors in them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

Tensors = dict[str, torch.Tensor]

DTYPES = (
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits, NaN and infinities among them; 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def whole_tensors() -> Tensors:
    """Every element type, and the shapes whose splits differ; the same on every rank."""
    tensors = {f"dtype.{str(dtype)[6:]}": random_bits((9, 6), dtype, n) for n, dtype in enumerate(DTYPES)}
    shapes = {
        "rows": (10, 7),
        "columns": (6, 13),
        "middle": (3, 10, 5),
        "last_of_three": (3, 4, 9),
        "grid": (10, 12),
        "two_inner": (5, 8, 6),
        "strided": (16, 3),
        "replicated": (4, 3),
        "fewer_than_ranks": (2, 5),
        "vector": (11,),
        "scalar": (),
        "empty": (0, 4),
        "wide": (3, 100_001),
        "plain": (7, 3),
    }
    for number, (name, shape) in enumerate(shapes.items()):
        tensors[name] = random_bits(shape, torch.bfloat16 if number % 2 else torch.float32, 100 + number)
    tensors["transposed"] = random_bits((6, 8), torch.float32, 200).t()
    tensors["channels_last"] = random_bits((4, 3, 5, 6), torch.float32, 201).to(memory_format=torch.channels_last)
    tensors["expanded"] = random_bits((1, 5), torch.float32, 202).expand(4, 5)
    tensors["a_view"] = random_bits((8, 8), torch.float32, 203)[2:6, 1:4]
    return tensors


def sharded_tensors() -> dict[str, Any]:
    """`whole_tensors` over the four ranks, as meshes of 4 and of 2 x 2."""
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    placements: dict[str, tuple[Any, list[Any]]] = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "middle": (line, [Shard(1)]),
        "last_of_three": (line, [Shard(2)]),
        "grid": (square, [Shard(0), Shard(1)]),
        "two_inner": (square, [Shard(1), Shard(2)]),
        "replicated": (line, [Replicate()]),
        "fewer_than_ranks": (line, [Shard(0)]),
        "vector": (square, [Replicate(), Shard(0)]),
        "scalar": (line, [Replicate()]),
        "empty": (line, [Shard(0)]),
        "wide": (line, [Shard(1)]),
        "channels_last": (line, [Shard(0)]),
    }
    state: dict[str, Any] = {}
    for name, tensor in whole_tensors().items():
        if name.startswith("dtype."):
            state[name] = distribute_tensor(tensor, line, [Shard(0)], src_data_rank=None)
        elif name == "strided":
            # as FSDP2 shards a parameter that tensor parallelism has split along the same dimension
            rank = square.get_coordinate()
            local = tensor.view(2, 2, 4, 3)[rank[1], rank[0]].clone()
            places = [_StridedShard(0, split_factor=2), Shard(0)]
            state[name] = DTensor.from_local(local, square, places, run_check=False)
        elif name in placements:
            mesh, places = placements[name]
            state[name] = distribute_tensor(tensor, mesh, places, src_data_rank=None)
        else:
            state[name] = tensor
    # a local shard that is not in row-major order
    state["transposed"] = DTensor.from_local(_transposed_shard(), line, [Shard(0)], run_check=False)
    return state


def _transposed_shard() -> torch.Tensor:
    rank = dist.get_rank()
    whole = whole_tensors()["transposed"]  # [8, 6], column-major
    local = whole[2 * rank : 2 * rank + 2]
    column_major = torch.empty(6, 2).t()
    column_major.copy_(local)
    return column_major


def save_all_writers(folder: Path) -> None:
    """The same state through every writer of torch."""
    warnings.simplefilter("ignore")
    state = {"model": sharded_tensors(), "epoch": 3}
    dcp.save(state, checkpoint_id=folder / "plain")
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "files", single_file_per_rank=False))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "threads", thread_count=2))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "ranks"), use_collectives=False)
    zstd = dcp.FileSystemWriter(folder / "zstd", _extensions=[ZStandard()])
    dcp.save(state, storage_writer=zstd)
    # safetensors knows neither views into other storages nor strides
    plain = {name: value for name, value in state["model"].items() if name not in _NOT_FOR_SAFETENSORS}
    safetensors = SerializationFormat.SAFETENSORS
    writer = dcp.FileSystemWriter(folder / "safetensors", serialization_format=safetensors)
    dcp.save({"model": plain, "epoch": 3}, storage_writer=writer)
    dcp.save(plain, storage_writer=HuggingFaceStorageWriter(str(folder / "hf_shards"), save_distributed=True))


_NOT_FOR_SAFETENSORS = ("transposed", "channels_last", "expanded", "a_view", "empty")


class Net(nn.Module):
    """A small model with a buffer and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.register_buffer("scale", torch.tensor([2.0]))
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(tokens) * self.scale
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(hidden)


def save_trainers(folder: Path) -> Tensors:
    """One step of FSDP2, saved in the layouts that trainers document; returns the model's whole tensors."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = Net()
    mesh = init_device_mesh("cpu", (4,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.arange(16).view(2, 8)).square().mean().backward()
    optimizer.step()
    weights = get_model_state_dict(model)
    state = get_optimizer_state_dict(model, optimizer)

    # torch's own tutorial: one Stateful for both
    dcp.save({"app": {"model": weights, "optim": state}}, checkpoint_id=folder / "app")
    # accelerate: two folders, each with a root key
    dcp.save({"model": weights}, checkpoint_id=folder / "accelerate" / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": state}, checkpoint_id=folder / "accelerate" / "optimizer_0")
    # VeOmni: nested model and optimizer, extra state of each rank in a folder beside
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "veomni")
    extra = folder / "veomni" / "extra_state"
    extra.mkdir(exist_ok=True)
    torch.save({"global_step": 1}, extra / f"extra_state_rank_{dist.get_rank()}.pt")
    # torchtitan: the model's names at the root, flattened optimizer, tensors in its train state
    flat = {f"state.{name}.{key}": value for name, values in state["state"].items() for key, value in values.items()}
    titan = {**weights, "optimizer": flat, "train_state": {"step": torch.tensor(1)}, "lr_scheduler": {"last_epoch": 1}}
    dcp.save(titan, checkpoint_id=folder / "torchtitan")
    # no nesting at all
    dcp.save(weights, checkpoint_id=folder / "flat")
    # DDP of a compiled model, as its state dict spells it
    dcp.save({f"module._orig_mod.{name}": value for name, value in weights.items()}, checkpoint_id=folder / "wrapped")
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in weights.items()
    }
