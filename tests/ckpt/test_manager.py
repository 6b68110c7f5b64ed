"""CheckpointManager: what is loaded is bitwise what was saved, whatever wrapped and sharded the model."""

from __future__ import annotations

import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from veomni_ckpt import CheckpointError, CheckpointManager
from veomni_ckpt.names import named_tensors, unwrap

LAYOUTS = ["plain", "ddp", "fsdp1", "fsdp2"]


class Net(nn.Module):
    """Uneven sizes, a bfloat16 part, a buffer, a submodule named as DDP names its own."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.low = nn.Linear(5, 3, dtype=torch.bfloat16)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.low(self.norm(self.module(x)).tanh().bfloat16()).float()


class PlainNet(nn.Module):
    """One dtype and every parameter used, as FSDP1's flattening wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.module(x).tanh())


def wrap(model: nn.Module, layout: str) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if layout in ("fsdp1", "fsdp1_mesh"):  # with a mesh its state dicts hold DTensors, without one ShardedTensors
        mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if layout == "fsdp1_mesh" else None
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=True, device_mesh=mesh, device_id=cpu)
    if layout in ("fsdp2", "hsdp", "fsdp2_dim1"):
        shape = (2, dist.get_world_size() // 2) if layout == "hsdp" else (dist.get_world_size(),)
        names = ("replicate", "shard") if layout == "hsdp" else ("shard",)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model.low, mesh=mesh)  # a group gathers one dtype
        fully_shard(model, mesh=mesh)
    if layout == "compile":
        return torch.compile(model, backend="eager")
    return model


def build(layout: str, seed: int, net: type[nn.Module] = Net) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = wrap(net(), layout)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    if layout.startswith("fsdp1"):  # flattened parameters have lost their dimensions
        decay, rest = list(model.parameters()), []
    groups = [{"params": decay, "weight_decay": 0.1}] + ([{"params": rest, "weight_decay": 0.0}] if rest else [])
    return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(3)  # the same rows on every rank, so that layouts agree
    for _ in range(steps):
        model(torch.randn(4, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that must come back, as whole tensors by original name (not for FSDP1, whose tensors are flat shards)."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        state = [{k: whole(v) for k, v in values.items()} for values in optimizer.state.values()]
        tensors = [whole(parameter) for parameter in model.parameters()]
        return {"model": tensors, "state": state, "groups": hyperparameters(optimizer)}
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    return {
        "model": {name: whole(tensor) for name, tensor in named_tensors(model)},
        "state": {names[id(p)]: {k: whole(v) for k, v in vs.items()} for p, vs in optimizer.state.items()},
        "groups": hyperparameters(optimizer),
    }


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Equal to the bit, dtype and type included."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, place
        assert a.shape == b.shape, place
        assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8)), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}.{number}")
    else:
        assert a == b, place


def round_trip(folder: Path, layout: str, async_save: bool) -> None:
    net = PlainNet if layout.startswith("fsdp1") else Net
    model, optimizer = build(layout, seed=0, net=net)
    manager = CheckpointManager(folder, async_save=async_save)
    train(model, optimizer, 2)
    before = contents(model, optimizer)
    manager.save(2, model, optimizer, {"step": 2})
    train(model, optimizer, 1)  # while an asynchronous save may still be writing
    manager.wait()
    for steps in (0, 1):  # into an optimizer that has not stepped, and into one that has
        other, other_optimizer = build(layout, seed=1, net=net)
        train(other, other_optimizer, steps)
        assert manager.load("auto", other, other_optimizer) == {"step": 2}
        assert_same(contents(other, other_optimizer), before)
        train(other, other_optimizer, 1)
        assert_same(contents(other, other_optimizer)["groups"], contents(model, optimizer)["groups"])
    manager.close()


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, "fsdp1_mesh", "hsdp"])
def test_a_round_trip_is_bitwise_on_two_ranks(two_ranks: Ranks, tmp_path: Path, layout: str, async_save: bool) -> None:
    two_ranks.run(round_trip, tmp_path, layout, async_save)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("layout", ["plain", "compile"])
def test_a_round_trip_is_bitwise_without_a_process_group(tmp_path: Path, layout: str, async_save: bool) -> None:
    round_trip(tmp_path, layout, async_save)
