"""Parts that come from folders of pretrained weights, and parts that keep their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import Ranks
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from veomni_models import OmniModel
from veomni_recipes.run_folder import read_metrics
from veomni_recipes.tasks.omni import train_omni_model

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 420,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **TEXT)).save_pretrained(folder / "text")
    # transformers stores this one under other names than it has in memory
    AutoModel.from_config(AutoConfig.for_model("dinov2", **TOWER)).save_pretrained(folder / "tower")
    return folder


def write_config(arguments: list[str], folders: Path, path: Path) -> list[str]:
    path.write_text(
        f"model:\n  model_path: {folders}/text\n"
        f"  encoders:\n    image: {{model_path: {folders}/tower, merge_size: 2}}\n"
        "data: {num_workers: 0}\n"
        "train: {data_parallel_mode: fsdp2, init_device: meta, enable_mixed_precision: false}\n"
    )
    return [str(path), *arguments[1:], "--train.max_steps=4", "--train.lr=1e-3", "--train.save_hf_weights=true"]


def train(arguments: list[str]) -> None:
    train_omni_model.main(arguments)


def test_sharded_from_meta_starts_where_one_process_with_its_weights_does(
    arguments: list[str], folders: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    command = write_config(arguments, folders, tmp_path / "run.yaml")
    train([*command, f"--train.output_dir={tmp_path}/one", "--train.init_device=cpu"])
    two_ranks.run(train, [*command, f"--train.output_dir={tmp_path}/two"])
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert max(abs(a - b) / a for a, b in zip(one, two, strict=True)) <= 1e-5


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [
        pytest.param("freeze_encoder", {"encoders"}, marks=pytest.mark.slow),
        ("freeze_encoder_all", {"encoders", "projectors"}),
        ("freeze_foundation", {"foundation"}),
    ],
)
def test_frozen_parts_keep_their_weights_and_the_others_learn(
    frozen: str, kept: set[str], arguments: list[str], folders: Path, tmp_path: Path, two_ranks: Ranks
) -> None:
    command = write_config(arguments, folders, tmp_path / "run.yaml")
    two_ranks.run(train, [*command, f"--train.output_dir={tmp_path}/start", "--train.lr=0", "--train.lr_min=0"])
    two_ranks.run(train, [*command, f"--train.output_dir={tmp_path}/run", f"--train.{frozen}=true"])
    before, after = (OmniModel.from_pretrained(tmp_path / name / "hf_ckpt").state_dict() for name in ("start", "run"))
    learnt = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert learnt == {"foundation", "encoders", "projectors"} - kept
