"""Hugging Face folders in and out of sharded models."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from veomni_ckpt import CheckpointError, export_hf, load_pretrained

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


def qwen3(tied: bool, seed: int = 0) -> Qwen3ForCausalLM:
    from transformers import Qwen3Config, Qwen3ForCausalLM  # seconds, which ranks that need it not are spared

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=37,  # odd sizes: shards of unequal length
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


def shard(model: nn.Module, layout: str) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if layout in ("fsdp2", "fsdp2_dim1"):

        def placement(parameter: nn.Parameter) -> Shard:
            even = parameter.dim() == 2 and parameter.size(1) % dist.get_world_size() == 0
            return Shard(1 if even and layout == "fsdp2_dim1" else 0)

        for layer in model.model.layers:
            fully_shard(layer, shard_placement_fn=placement)
        fully_shard(model, shard_placement_fn=placement)
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Clones: a tensor that is handed over the pipe must not be a view of what the rank goes on to change."""
    state = model.state_dict()
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in state.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def export(folder: Path, layout: str, tied: bool, options: dict[str, Any]) -> None:
    model = shard(qwen3(tied), layout)
    if layout == "fsdp2":
        with torch.no_grad():  # leaves the root gathered, as an evaluation before the export does
            model(input_ids=torch.arange(5)[None])
    export_hf(model, folder, **options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["ddp", "fsdp1", "fsdp2", "fsdp2_dim1"])
def test_from_pretrained_loads_what_a_sharded_model_exports(
    two_ranks: Ranks, tmp_path: Path, layout: str, tied: bool
) -> None:
    folder = tmp_path / "hf"
    two_ranks.run(export, folder, layout, tied, {})
    model = qwen3(tied)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert_equal(dict(loaded.state_dict()), dict(model.state_dict()))
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert (folder / "generation_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_files_stay_below_the_limit_and_carry_the_dtype(two_ranks: Ranks, tmp_path: Path) -> None:
    folder, asset = tmp_path / "hf", tmp_path / "merges.txt"
    asset.write_text("a b")
    options = {"max_shard_size": "4KB", "dtype": torch.bfloat16, "assets": [asset, qwen3(True).config]}
    two_ranks.run(export, folder, "fsdp2", False, options)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    total = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not a dict
            assert size <= 4000
            total += size
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    loaded = type(qwen3(False)).from_pretrained(folder)
    assert_equal(dict(loaded.state_dict()), dict(qwen3(False).bfloat16().state_dict()))
    assert (folder / "merges.txt").read_text() == "a b"


def load(folder: Path, layout: str, tied: bool) -> dict[str, torch.Tensor]:
    model = shard(qwen3(tied, seed=1), layout)
    load_pretrained(model, folder)
    return whole(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["plain", "ddp", "fsdp2", "fsdp2_dim1"])
def test_a_sharded_model_loads_what_transformers_saved(
    two_ranks: Ranks, tmp_path: Path, layout: str, tied: bool
) -> None:
    model = qwen3(tied)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    for state in two_ranks.run(load, tmp_path, layout, tied):
        named = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        assert_equal(named, dict(model.state_dict()))


def load_and_export_with_replicas(source: Path, target: Path) -> dict[str, torch.Tensor]:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3))  # uneven shards
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    load_pretrained(model, source)
    export_hf(model, target)
    return whole(model)


def test_four_ranks_with_replicas_load_and_export(four_ranks: Ranks, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3))
    export_hf(model, source)
    for state in four_ranks.run(load_and_export_with_replicas, source, target):
        assert_equal(state, dict(model.state_dict()))
    assert_equal(load_file(target / "model.safetensors"), dict(model.state_dict()))


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mean", torch.arange(3.0))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def test_buffers_that_are_saved_are_loaded_and_values_are_cast(tmp_path: Path) -> None:
    export_hf(Buffered().double(), tmp_path / "hf")
    model = Buffered()
    nn.init.zeros_(model.scale)
    model.mean.zero_()
    load_pretrained(model, tmp_path / "hf")
    assert model.scale == 2
    assert model.mean.tolist() == [0, 1, 2]
    assert model.mean.dtype == torch.float32


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    export_hf(nn.Linear(3, 2), folder)
    cases: list[tuple[nn.Module, str]] = [
        (nn.Linear(3, 2, bias=False), r"hf does not fit the model: it has bias, which the model has not"),
        (
            nn.ModuleDict({"a": nn.Linear(3, 2)}),
            r"it has no a\.weight, a\.bias, which the model has; it has bias, weight",
        ),
        (nn.Linear(4, 2), r"hf does not fit the model: weight is \[2, 3\] in the file, and \[2, 4\] in the model"),
    ]
    for model, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(model, folder)
    with pytest.raises(CheckpointError, match="it is no Hugging Face folder"):
        load_pretrained(nn.Linear(3, 2), tmp_path)
    whole_file = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole_file[:-3])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_pretrained(nn.Linear(3, 2), folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"weight": "../secret.safetensors"}, "names '../secret.safetensors', which is not in the folder"),
        ({"weight": "a.safetensors", "bias": "a.safetensors"}, "a.safetensors does not hold bias"),
        ({"weight": "a.safetensors", "bias": "b.safetensors"}, "b.safetensors is missing"),
        (None, "index.json cannot be read"),
    ],
)
def test_an_index_that_is_wrong_is_named(tmp_path: Path, weight_map: Any, message: str) -> None:
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(nn.Linear(3, 2), tmp_path)


def fsdp1_is_refused(folder: Path) -> str:
    try:
        load_pretrained(shard(qwen3(True), "fsdp1"), folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_an_fsdp1_model_is_to_be_loaded_before_wrapping(two_ranks: Ranks, tmp_path: Path) -> None:
    assert "load it before wrapping" in two_ranks.run(fsdp1_is_refused, tmp_path)[0]


def load_with_a_file_missing_on_one_rank(folders: list[Path]) -> str:
    try:
        load(folders[dist.get_rank()], "fsdp2", True)
    except CheckpointError as error:
        return str(error)
    return ""


def test_if_one_rank_cannot_read_all_raise(two_ranks: Ranks, tmp_path: Path) -> None:
    qwen3(True).save_pretrained(tmp_path / "there")
    for message in two_ranks.run(load_with_a_file_missing_on_one_rank, [tmp_path / "there", tmp_path / "absent"]):
        assert message.startswith("rank 1: ")
        assert "absent" in message


def export_with_full_disk(folder: Path) -> str:
    """A file size limit stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        export(folder, "fsdp2", True, {"max_shard_size": "8KB"})
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def test_a_full_disk_leaves_the_older_folder_and_all_ranks_raise(two_ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("older")
    for message in two_ranks.run(export_with_full_disk, folder):
        assert "hf was not exported: " in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    two_ranks.run(export, folder, "fsdp2", True, {})
    assert type(qwen3(True)).from_pretrained(folder).config.hidden_size == 24


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(CheckpointError, match="is not a Hugging Face folder: give a name that is free"):
        export_hf(nn.Linear(2, 2), tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(CheckpointError, match="max_shard_size='5 bananas' is no size"):
        export_hf(nn.Linear(2, 2), tmp_path / "hf", max_shard_size="5 bananas")
    with pytest.raises(CheckpointError, match="neither a file nor an object with save_pretrained"):
        export_hf(nn.Linear(2, 2), tmp_path / "hf", assets=[tmp_path / "absent.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
