"""Checkpoints of what learns alone, and of models whose layers are on different ranks: bitwise, into any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from veomni_ckpt import CheckpointError, CheckpointManager, inspect
from veomni_ckpt.names import named_tensors

Bits = dict[str, bytes]


def bits(tensor: torch.Tensor) -> bytes:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Bits:
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    found = {name: bits(tensor) for name, tensor in named_tensors(model)}
    for parameter, state in optimizer.state.items():
        found |= {f"{names[id(parameter)]}/{key}": bits(value) for key, value in state.items()}
    return found


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it, and a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.a = nn.Linear(6, 2, bias=False)
        self.b = nn.Linear(2, 4, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.base(x) + self.b(self.a(x)))


def adapted(layout: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = Adapted()  # the base is the same everywhere, what learns is not
    torch.manual_seed(seed)
    nn.init.normal_(model.get_submodule("a").weight)
    nn.init.normal_(model.get_submodule("b").weight)
    if layout == "ddp":
        model = DistributedDataParallel(model)
    elif layout == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif layout == "fsdp2":
        fully_shard(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(9))
    (model(x) * torch.arange(4.0)).exp().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_adapter(folder: Path, layout: str) -> Bits:
    model, optimizer = adapted(layout, seed=1)
    train(model, optimizer)
    manager = CheckpointManager(folder, trainable_only=True)
    manager.save(1, model, optimizer, {"layout": layout})
    return held(model, optimizer)


def pass_on(folder: Path, layout: str, step: int) -> Bits:
    """Load a step into another model, and save it as the next one."""
    model, optimizer = adapted(layout, seed=2)
    manager = CheckpointManager(folder, trainable_only=step % 2 == 0)
    manager.load(step, model, optimizer)
    manager.save(step + 1, model, optimizer)
    manager.load(step + 1, model, optimizer)
    return held(model, optimizer)


def test_what_learns_is_saved_alone_and_goes_into_every_layout(two_ranks: Ranks, tmp_path: Path) -> None:
    written = save_adapter(tmp_path, "plain")
    tensors = {tensor.name for tensor in inspect(tmp_path / "global_step_1").tensors}
    assert not any("base" in name for name in tensors)
    assert {"model.a.weight", "model.norm.running_mean", "optimizer.state.b.weight.exp_avg"} < tensors
    for step, layout in enumerate(["ddp", "fsdp2", "fsdp1", "fsdp1", "fsdp2", "ddp"], 1):
        answer = two_ranks.run(pass_on, tmp_path, layout, step)[0]
        if layout != "fsdp1":  # whose own tensors are flat: what it wrote is read by the next
            assert answer == written
    assert pass_on(tmp_path, "plain", 7) == written


def test_the_base_stays_as_it_is_and_must_be_frozen_to_be_missing(tmp_path: Path) -> None:
    save_adapter(tmp_path, "plain")
    model, optimizer = adapted("plain", seed=2)
    nn.init.constant_(model.get_submodule("base").weight, 7.0)
    manager = CheckpointManager(tmp_path)
    assert manager.load("auto", model, optimizer) == {"layout": "plain"}
    assert (model.get_submodule("base").weight == 7).all()
    model.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"does not fit: it has no base\.weight, which the model has"):
        manager.load("auto", model, optimizer)
    manager.save(2, model)  # all of it
    again, _ = adapted("plain", seed=3)
    CheckpointManager(tmp_path, trainable_only=True).load(2, again)
    assert (again.get_submodule("base").weight == 7).all()


def save_adapter_of_sharded_base(folder: Path) -> None:
    model, optimizer = adapted("fsdp2", seed=1)
    manager = CheckpointManager(folder, trainable_only=True, async_save=True)
    train(model, optimizer)
    manager.save(1, model, optimizer)
    expected = held(model, optimizer)
    train(model, optimizer)
    other, other_optimizer = adapted("fsdp2", seed=2)
    manager.load("auto", other, other_optimizer)
    assert held(other, other_optimizer) == expected
    manager.close()


def test_an_asynchronous_save_of_what_learns(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(save_adapter_of_sharded_base, tmp_path)


class Layer(nn.Module):
    """A linear layer that counts, which is a state but no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.up(x).tanh()


class Stage(nn.Module):
    """Some of the layers of a model, under their names in the whole."""

    def __init__(self, layers: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Layer() for number in layers})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def stage(
    layers: list[int], seed: int, mesh: DeviceMesh | None = None, decay: float = 0.1
) -> tuple[Stage, torch.optim.Optimizer]:
    torch.manual_seed(seed + sum(layers))
    model = Stage(layers)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    groups = [{"params": weights, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.1)


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def counts(model: Stage) -> dict[str, int]:
    return {name: layer.count for name, layer in model.layers.items()}  # type: ignore[misc]


def stage_mesh(world_size: int) -> tuple[int, DeviceMesh | None]:
    """This rank's stage of two, and the mesh of the ranks that shard it."""
    if world_size == 2:
        return dist.get_rank(), None
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("pp", "shard"))
    return mesh.get_local_rank("pp"), mesh["shard"]


def save_stages(folder: Path, async_save: bool) -> tuple[Bits, dict[str, int]]:
    place, mesh = stage_mesh(dist.get_world_size())
    model, optimizer = stage([[0, 1, 2], [3, 4]][place], seed=1, mesh=mesh)
    for _ in range(1 + place):
        step_once(model, optimizer)
    manager = CheckpointManager(folder, async_save=async_save)
    manager.save(1, model, optimizer, {"step": 1})
    expected = held(model, optimizer), counts(model)
    step_once(model, optimizer)
    manager.close()
    return expected


def load_stages(folder: Path) -> tuple[Bits, dict[str, int], list[float]]:
    """Divided in another place than when it was saved."""
    place, mesh = stage_mesh(dist.get_world_size())
    model, optimizer = stage([[0], [1, 2, 3, 4]][place], seed=2, mesh=mesh, decay=0.5)
    manager = CheckpointManager(folder)
    assert manager.load("auto", model, optimizer) == {"step": 1}
    manager.close()
    return held(model, optimizer), counts(model), [group["weight_decay"] for group in optimizer.param_groups]


def joined(parts: list[Any]) -> Any:
    return {key: value for part in parts for key, value in part.items()}


@pytest.mark.parametrize("async_save", [False, True])
def test_stages_of_a_pipeline_are_one_checkpoint(
    two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path, async_save: bool
) -> None:
    written = two_ranks.run(save_stages, tmp_path, async_save)
    expected, expected_counts = joined([part for part, _ in written]), joined([part for _, part in written])
    assert len(expected) == 5 * 2 * 4
    assert expected_counts == {"0": 1, "1": 1, "2": 1, "3": 2, "4": 2}
    whole, optimizer = stage([0, 1, 2, 3, 4], seed=3, decay=0.5)
    CheckpointManager(tmp_path).load("auto", whole, optimizer)
    assert held(whole, optimizer) == expected
    assert counts(whole) == expected_counts
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for ranks in (two_ranks, four_ranks):
        loaded = ranks.run(load_stages, tmp_path)
        assert joined([part for part, _, _ in loaded]) == expected
        assert joined([part for _, part, _ in loaded]) == expected_counts
        assert all(decays == [0.1, 0.0] for _, _, decays in loaded)


def test_sharded_stages_go_into_one_process_and_back(two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path) -> None:
    written = four_ranks.run(save_stages, tmp_path / "stages", False)
    expected = joined([part for part, _ in written])
    whole, optimizer = stage([0, 1, 2, 3, 4], seed=3)
    CheckpointManager(tmp_path / "stages").load("auto", whole, optimizer)
    assert held(whole, optimizer) == expected
    CheckpointManager(tmp_path / "whole").save(1, whole, optimizer, {"step": 1})
    assert joined([part for part, _, _ in two_ranks.run(load_stages, tmp_path / "whole")]) == expected


def load_too_few(folder: Path) -> list[str]:
    messages = []
    place, _ = stage_mesh(2)
    for layers in ([[0, 1], [2, 3]], [[0, 1, 2], [3, 4, 5]]):
        model, optimizer = stage(layers[place], seed=2)
        try:
            CheckpointManager(folder).load("auto", model, optimizer)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def test_a_layer_that_no_stage_has_or_that_was_not_saved_is_named_on_every_rank(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    two_ranks.run(save_stages, tmp_path, False)
    for too_few, too_many in two_ranks.run(load_too_few, tmp_path):
        assert "does not fit: it has layers.4._extra_state, layers.4.up.bias, layers.4.up.weight, which" in too_few
        assert "does not fit: rank 1: no optimizer state was saved for layers.5.up.weight" in too_many
