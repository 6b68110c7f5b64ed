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
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
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
        if isinstance(model, Net):
            fully_shard(model.low, mesh=mesh)  # a group gathers one dtype
        fully_shard(model, mesh=mesh)
    if layout == "compile":
        return torch.compile(model, backend="eager")
    return model


def build(layout: str, seed: int, net: type[nn.Module] = Net) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = wrap(net(), layout)
    decay = [p for name, p in model.named_parameters() if name.endswith("weight")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("weight")]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
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
    """All that must come back, by original name: whole tensors, but this rank's flat shards for FSDP1."""
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


def save_trained(folder: Path, layout: str, steps: int, net: type[nn.Module] = PlainNet) -> dict[str, Any]:
    model, optimizer = build(layout, seed=0, net=net)
    train(model, optimizer, steps)
    CheckpointManager(folder).save(steps, model, optimizer)
    return contents(model, optimizer)


def load_into(folder: Path, layout: str, steps_before: int = 0, net: type[nn.Module] = PlainNet) -> dict[str, Any]:
    """Load, save again as the step after (so that the next layout reads what this one wrote), and tell what it got."""
    model, optimizer = build(layout, seed=1, net=net)
    train(model, optimizer, steps_before)
    manager = CheckpointManager(folder)
    manager.load("auto", model, optimizer)
    manager.save((manager.latest() or 0) + 1, model, optimizer)
    return contents(model, optimizer)


def test_a_checkpoint_of_two_ranks_goes_to_one_and_to_four(two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path) -> None:
    written = two_ranks.run(save_trained, tmp_path, "fsdp2", 2, Net)[0]
    assert_same(load_into(tmp_path, "plain", net=Net), written)
    for layout in ("fsdp2", "hsdp"):
        for loaded in four_ranks.run(load_into, tmp_path, layout, 0, Net):
            assert_same(loaded, written)


def test_every_layout_reads_every_other(two_ranks: Ranks, tmp_path: Path) -> None:
    written = save_trained(tmp_path, "plain", 2)
    for layout in ("ddp", "fsdp1", "fsdp2", "fsdp1_mesh", "ddp"):
        loaded = two_ranks.run(load_into, tmp_path, layout, 1)[0]
        if layout.startswith("fsdp1"):  # what it holds is in flat shards: what it wrote is read by the next
            assert_same(loaded["groups"], written["groups"])
        else:
            assert_same(loaded, written)


def snapshot_of_fresh(folder: Path, layout: str) -> tuple[bool, bool, dict[str, Any]]:
    """Save an optimizer that has not stepped; load it into one that has and into one that has not."""
    model, optimizer = build(layout, seed=0, net=PlainNet)
    manager = CheckpointManager(folder)
    manager.save(0, model, optimizer)
    untouched = not optimizer.state
    stepped_model, stepped = build(layout, seed=1, net=PlainNet)
    train(stepped_model, stepped, 1)
    manager.load(0, stepped_model, stepped)
    return untouched, not stepped.state, hyperparameters(stepped)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_optimizer_that_has_not_stepped_is_saved_as_such(two_ranks: Ranks, tmp_path: Path, layout: str) -> None:
    for untouched, emptied, group in two_ranks.run(snapshot_of_fresh, tmp_path, layout):
        assert untouched
        assert emptied
        assert group["lr"] == 0.01


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    return build("plain", seed, net=PlainNet)


def three_checkpoints(folder: Path, **options: Any) -> CheckpointManager:
    model, optimizer = make()
    manager = CheckpointManager(folder, **options)
    for step in (1, 2, 10):
        train(model, optimizer, 1)
        manager.save(step, model, optimizer, {"step": step})
    return manager


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "none")
    assert manager.latest() is None
    assert manager.load("auto", *make()) is None


def test_an_explicit_checkpoint_must_be_there(tmp_path: Path) -> None:
    manager = three_checkpoints(tmp_path)
    for which in (3, tmp_path / "global_step_3", str(tmp_path / "elsewhere")):
        with pytest.raises(CheckpointError, match=r"there is no checkpoint .*(global_step_3|elsewhere)"):
            manager.load(which, *make())
    assert manager.load(2, *make()) == manager.load(tmp_path / "global_step_2", *make()) == {"step": 2}


FILES = [".metadata", "__0_0.distcp", "extra_state.json", "extra_state.safetensors", "optimizer.json"]


@pytest.mark.parametrize("fault", ["truncated", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path, name: str, fault: str) -> None:
    manager = three_checkpoints(tmp_path)
    path = tmp_path / "global_step_10" / name
    data = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.warns(UserWarning, match="global_step_10.*the checkpoint before it is taken"):
        assert manager.load("auto", *make()) == {"step": 2}
    with pytest.raises(CheckpointError, match="global_step_10"):
        manager.load(10, *make())


def test_bytes_spoilt_within_the_right_length_give_way_too(tmp_path: Path) -> None:
    manager = three_checkpoints(tmp_path)
    path = tmp_path / "global_step_10" / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.warns(UserWarning, match=r"global_step_10/__0_0\.distcp is damaged"):
        assert manager.load("auto", *make()) == {"step": 2}


def test_if_all_are_damaged_the_run_does_not_start_over(tmp_path: Path) -> None:
    manager = three_checkpoints(tmp_path)
    for step in (1, 2, 10):
        (tmp_path / f"global_step_{step}" / ".metadata").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match=r"global_step_10.*global_step_2.*global_step_1"):
            manager.load("auto", *make())


def test_keep_last_keeps_the_newest_and_the_one_just_saved(tmp_path: Path) -> None:
    manager = three_checkpoints(tmp_path, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_10", "global_step_2"]
    manager.save(3, *make())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_10", "global_step_3"]
    with pytest.raises(ValueError, match="keep_last=0"):
        CheckpointManager(tmp_path, keep_last=0)


def test_steps_that_are_protected_or_multiples_stay(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=1, keep_every=4)
    for step in range(1, 10):
        manager.save(step, *make(), {"step": step})
        if step in (3, 6):
            manager.protect(step)
    names = {f"global_step_{step}" for step in (3, 4, 6, 8, 9)}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert manager.load(3, *make()) == {"step": 3}
    later = CheckpointManager(tmp_path, keep_last=1)
    later.release(6)
    later.release(5)
    later.save(3, *make())  # it stays protected
    later.save(10, *make())
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_3", "global_step_10"}
    with pytest.raises(CheckpointError, match="global_step_99 cannot be protected: there is no such"):
        later.protect(99)
    with pytest.raises(ValueError, match="keep_every=0"):
        CheckpointManager(tmp_path, keep_every=0)


def test_weights_that_both_have_are_loaded_alone_if_asked_for(tmp_path: Path) -> None:
    manager = three_checkpoints(tmp_path)
    saved, _ = make()
    manager.load(10, saved)
    extended = PlainNet()
    extended.add_module("more", nn.Linear(1, 1))
    del extended.out
    before = extended.more.weight.clone()
    with pytest.warns(UserWarning, match="which") as said:
        assert manager.load(10, extended, strict=False) == {"step": 10}
    sentences = [str(warning.message) for warning in said]
    assert f"{tmp_path / 'global_step_10'} has no more.weight, more.bias, which stays as it is" in sentences
    assert f"{tmp_path / 'global_step_10'} has out.bias, out.weight, which the model has not" in sentences
    assert torch.equal(extended.module.weight, saved.get_parameter("module.weight"))
    assert torch.equal(extended.more.weight, before)
    wider = PlainNet()
    wider.out = nn.Linear(5, 4)
    with pytest.raises(CheckpointError, match=r"out.weight is \[3, 5\] in the checkpoint"):
        manager.load(10, wider, strict=False)
    with pytest.raises(CheckpointError, match="it has none of the model's weights"):
        manager.load(10, nn.Sequential(nn.Linear(2, 2)), strict=False)
    with pytest.raises(CheckpointError, match="an optimizer needs all weights: give none, or strict=True"):
        manager.load(10, *make(), strict=False)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    manager = three_checkpoints(tmp_path)
    manager.save(10, *make(5), {"step": "again"})
    assert manager.load(10, *make()) == {"step": "again"}
    assert len(list(tmp_path.iterdir())) == 3


def test_leftovers_of_a_killed_run_are_tidied_and_nothing_else(tmp_path: Path) -> None:
    manager = three_checkpoints(tmp_path)
    (tmp_path / "global_step_10").rename(tmp_path / ".global_step_10.replaced")  # killed between two renames
    (tmp_path / ".global_step_11.partial").mkdir()
    (tmp_path / ".global_step_1.removed").mkdir()
    (tmp_path / ".mine.partial").mkdir()
    assert manager.load("auto", *make()) == {"step": 10}
    manager.save(12, *make())
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".mine.partial", "global_step_1", "global_step_10", "global_step_12", "global_step_2"]


def test_extra_state_comes_back_as_it_was(tmp_path: Path) -> None:
    extra = {
        "none": None,
        "nested": [{"a": (1, (2.5, [True])), "": "ü"}, float("inf"), 10**30, 0.1 + 0.2],
        "rng": torch.get_rng_state(),
        "list": [torch.arange(6, dtype=torch.int16).view(2, 3).t(), torch.tensor(1.5, dtype=torch.bfloat16)],
    }
    manager = CheckpointManager(tmp_path)
    manager.save(1, *make(), extra)
    assert_same(manager.load(1, *make()), extra)
    manager.save(2, *make())
    assert manager.load(2, *make()) == {}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"loader": [{"rng": {1, 2}}]}, r"extra_state\['loader'\]\[0\]\['rng'\] is a set"),
        ({"epochs": {1: "one"}}, r"extra_state\['epochs'\] has the key 1, a int: keys must be strings"),
    ],
)
def test_extra_state_of_another_kind_is_named(tmp_path: Path, extra: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointManager(tmp_path).save(1, *make(), extra)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit_says_what_differs(tmp_path: Path) -> None:
    manager = three_checkpoints(tmp_path)
    model, optimizer = make()
    wider, extended = PlainNet(), PlainNet()
    wider.out = nn.Linear(5, 4)
    extended.add_module("more", nn.Linear(1, 1))
    cases: list[tuple[nn.Module, str]] = [
        (wider, r"out.weight is \[3, 5\] in the checkpoint and \[4, 5\] in the model"),
        (PlainNet().bfloat16(), "module.weight is torch.float32 in the checkpoint and torch.bfloat16 in the model"),
        (extended, "it has no more.weight, more.bias, which the model has"),
        (PlainNet().module, "it has no weight, bias, which the model has"),
        (PlainNet().to("meta"), "meta device"),
    ]
    for other, message in cases:
        with pytest.raises(CheckpointError, match=f"global_step_10 does not fit: .*{message}"):
            manager.load("auto", other)
    manager.save(11, model)
    with pytest.raises(CheckpointError, match="saved without an optimizer"):
        manager.load(11, model, optimizer)
    with pytest.raises(CheckpointError, match="make the optimizer after the model is sharded"):
        manager.save(12, PlainNet(), optimizer)


def test_hyperparameters_find_their_parameters_in_another_grouping(tmp_path: Path) -> None:
    three_checkpoints(tmp_path)
    model, _ = make(1)
    one_each = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    CheckpointManager(tmp_path).load(10, model, one_each)
    assert [group["weight_decay"] for group in one_each.param_groups] == [0.1, 0.0, 0.1, 0.0]
    mixed = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="mixes parameters that were saved with different 'weight_decay'"):
        CheckpointManager(tmp_path).load(10, model, mixed)


def test_a_state_of_another_dtype_or_shape_than_its_parameter_is_kept(tmp_path: Path) -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
    optimizer.state[model.weight] = {"master": torch.rand(2, 3), "factor": torch.rand(2, 1), "count": 7}
    manager = CheckpointManager(tmp_path)
    manager.save(1, model, optimizer)
    other = nn.Linear(3, 2, dtype=torch.bfloat16)
    fresh = torch.optim.SGD(other.parameters(), lr=torch.tensor(0.1))
    manager.load(1, other, fresh)
    assert_same(dict(fresh.state[other.weight]), dict(optimizer.state[model.weight]))
    assert other.bias not in fresh.state
    assert_same(hyperparameters(fresh), hyperparameters(optimizer))


def save_with_full_disk(folder: Path, full_rank: int, async_save: bool) -> str:
    """A file size limit stands for a full disk: it stops the rank amid its files as ENOSPC would."""
    model, optimizer = build("fsdp2", 0, net=Net)
    manager = CheckpointManager(folder, async_save=async_save)
    manager.save(1, model, optimizer)
    manager.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    message = ""
    try:
        manager.save(2, model, optimizer)
        if async_save:
            train(model, optimizer, 1)
            manager.save(3, model, optimizer)
    except CheckpointError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    manager.save(4, model, optimizer)
    manager.close()
    return message


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("full_rank", [0, 1])
def test_if_one_rank_cannot_write_all_raise_and_go_on(
    two_ranks: Ranks, tmp_path: Path, full_rank: int, async_save: bool
) -> None:
    messages = two_ranks.run(save_with_full_disk, tmp_path, full_rank, async_save)
    assert messages[0] == messages[1]
    assert "global_step_2 was not saved: " in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_1", "global_step_4"]


def save_below_a_file(folder: Path) -> str:
    try:
        CheckpointManager(folder / "file" / "checkpoints").save(1, *make())
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_folder_that_cannot_be_made_is_one_sentence_on_every_rank(two_ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in two_ranks.run(save_below_a_file, tmp_path):
        assert "global_step_1 was not saved: " in message
        assert "NotADirectoryError" in message


def test_an_asynchronous_save_copies_into_the_same_buffers(tmp_path: Path) -> None:
    model, optimizer = make()
    manager = CheckpointManager(tmp_path, async_save=True)
    pointers = []
    for step in (1, 2):
        train(model, optimizer, 1)
        manager.save(step, model, optimizer)
        manager.wait()
        staged = manager._staging.stage({"weight": model.out.weight.detach()}, None)  # type: ignore[union-attr]
        pointers.append(staged["weight"].data_ptr())
    assert pointers[0] == pointers[1]
    manager.close()


def test_names_are_the_authors(tmp_path: Path) -> None:
    model, optimizer = build("compile", 0, net=PlainNet)
    train(model, optimizer, 1)
    CheckpointManager(tmp_path).save(1, model, optimizer)
    from torch.distributed.checkpoint import FileSystemReader

    names = set(FileSystemReader(tmp_path / "global_step_1").read_metadata().state_dict_metadata)
    expected = {f"model.{name}" for name in unwrap(model).state_dict()}
    for name, _ in PlainNet().named_parameters():
        expected |= {f"optimizer.state.{name}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
    assert names == expected
