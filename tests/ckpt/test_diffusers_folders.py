"""Transformers of diffusers in and out of sharded models, by diffusers' own names of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from veomni_ckpt import export_hf, load_pretrained

from tests.parallel.pictures import build


def export(folder: Path, layout: str, size: str) -> None:
    model = build("wan")
    if layout == "ddp":
        model = DistributedDataParallel(model)
    elif layout == "fsdp2":
        fully_shard([*model.blocks])
        fully_shard(model)
    export_hf(model, folder, max_shard_size=size)


def changed_by_loading(folder: Path) -> list[str]:
    model = build("wan")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fully_shard(model)
    load_pretrained(model, folder)
    return differences(build("wan"), {name: p.full_tensor() for name, p in model.named_parameters()})


def differences(model: nn.Module, other: dict[str, torch.Tensor]) -> list[str]:
    own = dict(model.named_parameters())
    assert own.keys() == other.keys()
    return [name for name in own if not torch.equal(own[name], other[name])]


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_diffusers_loads_what_is_exported_and_a_sharded_model_loads_it_too(
    layout: str, size: str, two_ranks: Ranks, tmp_path: Path
) -> None:
    from diffusers import AutoModel

    two_ranks.run(export, tmp_path / "transformer", layout, size)
    model = AutoModel.from_pretrained(str(tmp_path / "transformer"))
    assert type(model).__name__ == "WanTransformer3DModel"
    assert differences(build("wan"), dict(model.named_parameters())) == []
    assert two_ranks.run(changed_by_loading, tmp_path / "transformer") == [[], []]
