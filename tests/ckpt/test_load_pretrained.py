"""`load_pretrained`: what transformers converts while it loads, layouts, the meta device, and how much is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from veomni_ckpt import CheckpointError, LoadReport, dcp_to_hf, export_hf, load_pretrained
from veomni_ckpt.names import named_tensors

from tests.ckpt.test_hostile_corpus import safetensors_lies

TEXT: dict[str, Any] = {
    "vocab_size": 37,  # odd sizes: shards of unequal length
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(kind: str, meta: bool = False) -> Any:
    """A tiny model of transformers, with the weights of seed 0 or on the meta device."""
    import transformers

    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    elif kind == "qwen3_moe":
        more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 6}
        config = transformers.Qwen3MoeConfig(**TEXT, **more, tie_word_embeddings=True)
    else:
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 24}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}
        config = transformers.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    classes = {
        "mixtral": transformers.MixtralForCausalLM,
        "qwen3_moe": transformers.Qwen3MoeForCausalLM,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    }
    with torch.device("meta" if meta else "cpu"):
        return classes[kind](config)


def decoder(model: Any) -> Any:
    return model.get_decoder()


def fsdp2(model: Any) -> Any:
    for layer in decoder(model).layers:
        fully_shard(layer)
    return fully_shard(model)


def divide(model: Any, layout: str) -> Any:
    """Over 2 x 2 ranks as expert or tensor parallelism with FSDP2 leaves it: experts in DTensors of two dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "inner"))
    placements: dict[str, Any] = {
        "gate_up_proj": [Shard(2), Shard(0)] if layout == "ep" else [Shard(0), _StridedShard(1, split_factor=2)],
        "down_proj": [Shard(1), Shard(0)] if layout == "ep" else [Shard(0), Shard(2)],
        "q_proj.weight": [_StridedShard(0, split_factor=2), Shard(0)],
        "embed_tokens.weight": [Shard(0), Replicate()],
    }
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            end = next((end for end in placements if f"{path}.{name}".endswith(end)), None)
            if end is not None:
                zeros = torch.zeros(parameter.shape)
                sharded = distribute_tensor(zeros, mesh, placements[end], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(sharded))
    return model


def differences(model: nn.Module, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors whose part on this rank is not torch's own part of the whole tensor."""
    different = []
    for name, tensor in named_tensors(model):
        whole, own = expected[name], tensor.detach()
        if isinstance(own, DTensor):
            whole = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None).to_local()
            own = own.to_local()
        if own.dtype != whole.dtype or not torch.equal(own, whole):
            different.append(name)
    return different


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load_in_layout(kind: str, layout: str, folder: Path, broadcast: bool, target: Path) -> Any:
    expected = {name: tensor.clone() for name, tensor in build(kind).state_dict().items()}
    model = fsdp2(build(kind, meta=True)) if layout == "fsdp2" else divide(build(kind), layout)
    if broadcast and dist.get_rank():
        folder = folder / "only rank 0 has it"
    report = load_pretrained(model, folder, broadcast_from_rank0=broadcast)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tied = head is embedding
    inputs = torch.arange(8)[None]
    logits = model(input_ids=inputs).logits.detach() if layout == "fsdp2" else None
    if not broadcast:
        export_hf(model, target, max_shard_size="20KB")
    return differences(model, expected), report, tied, logits


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("mixtral", "fsdp2"), ("mixtral", "ep"), ("mixtral", "tp"), ("qwen3_moe", "fsdp2"), ("qwen2_5_vl", "fsdp2")],
)
def test_what_transformers_saved_comes_into_every_layout_and_out_again(
    four_ranks: Ranks, tmp_path: Path, kind: str, layout: str, broadcast: bool
) -> None:
    """Experts that lie one by one and renamed keys; FSDP2 from the meta device, whose logits say that buffers are."""
    model = build(kind)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    saved = load_all(tmp_path / "in")
    there = {"mixtral": ".block_sparse_moe.experts.0.w1.weight", "qwen3_moe": ".mlp.experts.3.up_proj.weight"}
    assert any(name.endswith(there.get(kind, "")) for name in saved)
    assert kind != "qwen2_5_vl" or {"visual.patch_embed.proj.weight", "model.embed_tokens.weight"} <= saved.keys()
    expected = model(input_ids=torch.arange(8)[None]).logits
    for different, report, tied, logits in four_ranks.run(
        load_in_layout, kind, layout, tmp_path / "in", broadcast, tmp_path / "out", timeout=240
    ):
        assert different == []
        assert (report.missing, report.unexpected) == ([], [])
        assert tied == (kind == "qwen3_moe")
        assert logits is None or torch.allclose(logits, expected, atol=1e-5)
    if not broadcast:
        exported = load_all(tmp_path / "out")
        assert exported.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(saved[name], exported[name])] == []


def test_names_are_reported_as_transformers_does(tmp_path: Path) -> None:
    """Missing and unexpected keys, less those that the model's class knows of; only without `strict` no error."""
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    state |= {"model.layers.0.rotary_emb.inv_freq": torch.ones(2), "extra.weight": torch.ones(2)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    text = r"it has no model\.norm\.weight, which the model has; it has extra\.weight, which the model has not"
    with pytest.raises(CheckpointError, match=text):
        load_pretrained(model, tmp_path)
    nn.init.constant_(model.model.norm.weight, 7)
    with pytest.warns(UserWarning, match=text):
        report = load_pretrained(model, tmp_path, strict=False)
    assert report == LoadReport(["model.norm.weight"], ["extra.weight"])
    assert (set(report.missing), set(report.unexpected)) == (info["missing_keys"], info["unexpected_keys"])
    assert model.model.norm.weight.tolist() == [7] * 24
    with pytest.raises(CheckpointError, match=r"no model\.norm\.weight, which the model has on the meta device"):
        load_pretrained(build("mixtral", meta=True), tmp_path, strict=False)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.experts.3.up_proj.weight"], state["model.layers.1.mlp.experts.2.down_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\..* made of model\.layers\.1\.mlp\.exp"):
        load_pretrained(model, tmp_path)


def test_a_folder_that_holds_the_models_own_names_loads_too(tmp_path: Path) -> None:
    """Experts in one tensor, as another trainer saved them, and a base model's names for a model with a head."""
    model = build("qwen3_moe")
    own = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for folder, prefix in (("own", ""), ("base", "model.")):
        (tmp_path / folder).mkdir()
        state = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
        save_file(state, tmp_path / folder / "model.safetensors")
        loaded = build("qwen3_moe", meta=True)
        assert load_pretrained(loaded, tmp_path / folder) == LoadReport()
        assert differences(loaded, dict(model.state_dict())) == []


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_5_vl"])
def test_from_pretrained_takes_what_the_converter_writes(tmp_path: Path, kind: str) -> None:
    """Without transformers the converter keeps the model's own names, experts in one tensor."""
    model = build(kind)
    model.config.save_pretrained(tmp_path / "assets")
    dcp.save({"model": model.state_dict()}, storage_writer=dcp.FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    dcp_to_hf(tmp_path / "dcp", tmp_path / "hf", assets=tmp_path / "assets")
    loaded, info = type(model).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    assert differences(loaded, dict(model.state_dict())) == []
    again = build(kind, meta=True)
    assert load_pretrained(again, tmp_path / "hf") == LoadReport()
    assert differences(again, dict(model.state_dict())) == []


class Computed(nn.Module):
    """A buffer that is in no file, and nobody knows how to fill."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def test_a_buffer_on_the_meta_device_that_nobody_can_fill_is_named(tmp_path: Path) -> None:
    export_hf(Computed(), tmp_path / "hf")
    with torch.device("meta"):
        model = Computed()
    with pytest.raises(CheckpointError, match=r"table of the model: on the meta device, and in no file"):
        load_pretrained(model, tmp_path / "hf")
    linear = nn.Linear(3, 2)
    export_hf(linear, tmp_path / "linear")
    loaded = nn.Linear(3, 2, device="meta")
    load_pretrained(loaded, tmp_path / "linear")
    assert torch.equal(loaded.weight, linear.weight)


def count_reads(folder: Path, dims: list[int]) -> tuple[int, int, int]:
    """Bytes that this rank reads, its share of the model, and the number of reads."""
    from veomni_ckpt import stored_tensors, tensor_reader

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(*(nn.Linear(2048, 512, bias=False, device="meta") for _ in dims))
    for layer, dim in zip(model, dims, strict=True):
        fully_shard(layer, mesh=mesh, shard_placement_fn=lambda _, dim=dim: Shard(dim))
    read = []

    def fill(checkpoint: Any, name: str, file: int, parts: Any, length: int, source: int) -> None:
        read.append(length)
        tensor_reader.fill(checkpoint, name, file, parts, length, source)

    stored_tensors.fill, kept = fill, stored_tensors.fill
    try:
        load_pretrained(model, folder)
    finally:
        stored_tensors.fill = kept
    return sum(read), sum(p.to_local().nbytes for p in model.parameters()), len(read)


def test_a_rank_reads_no_byte_that_it_does_not_hold(four_ranks: Ranks, tmp_path: Path) -> None:
    """A part of the rows is one range of bytes, a part of the columns one of each row."""
    model = nn.Sequential(*(nn.Linear(2048, 512, bias=False) for _ in range(3)))
    export_hf(model, tmp_path / "hf", max_shard_size="5MB")
    for read, held, count in four_ranks.run(count_reads, tmp_path / "hf", [0, 1, 0]):
        assert read == held == 3 * 2**20
        assert count == 1 + 512 + 1


def load_what_breaks(folder: Path) -> str:
    """Rank 0 finds at the last tensor that the file is shorter than it was; nobody waits for ever."""
    from veomni_ckpt import stored_tensors
    from veomni_ckpt.errors import DamagedCheckpointError

    def fill(*_: Any) -> None:
        raise DamagedCheckpointError("the file was cut")

    model = fully_shard(nn.Linear(5, 7))
    stored_tensors.fill, kept = fill, stored_tensors.fill
    try:
        load_pretrained(model, folder, broadcast_from_rank0=True)
    except CheckpointError as error:
        return str(error)
    finally:
        stored_tensors.fill = kept
    return ""


def test_if_the_rank_that_reads_fails_all_raise(two_ranks: Ranks, tmp_path: Path) -> None:
    export_hf(nn.Linear(5, 7), tmp_path / "hf")
    for message in two_ranks.run(load_what_breaks, tmp_path / "hf"):
        assert message == "rank 0: the file was cut"
    for message in two_ranks.run(load_what_breaks, tmp_path / "absent"):
        assert message.startswith("rank 0: ")
        assert "is no Hugging Face folder" in message


@pytest.mark.parametrize(("name", "content"), list(safetensors_lies()))
def test_hostile_files_are_refused_before_anything_is_allocated(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(nn.Linear(4, 3), tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()


def export_and_measure(folder: Path) -> tuple[float, float]:
    """MiB that this rank's memory grew by at its peak, and its shard's size."""
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False, device="meta") for _ in range(12)))
    for layer in model:
        fully_shard(layer)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().fill_(1.0)

    def status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    export_hf(model, folder, max_shard_size="64MB")
    return status("VmHWM") - before, sum(p.to_local().nbytes for p in model.parameters()) / 2**20


@pytest.mark.slow
def test_no_rank_holds_more_than_a_file_while_it_exports(four_ranks: Ranks, tmp_path: Path) -> None:
    """201 MB in files of 64 MB: beside its shard a rank holds a block, in what it gets and in what it writes."""
    for grown, shard in four_ranks.run(export_and_measure, tmp_path / "hf", timeout=300):
        assert shard == 48
        assert grown < 61
    assert len(load_all(tmp_path / "hf")) == 12
