from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file
from torch import nn
from veomni_ckpt import dcp_to_hf, export_hf
from veomni_parallel import build_parallelize_model, init_parallel_state
from veomni_recipes.ema import ema_weights, update_ema
from veomni_recipes.optimization import build_optimizer
from veomni_recipes.run_folder import read_metrics
from veomni_recipes.shards import local
from veomni_recipes.tasks.omni import train_omni_model

from tests.recipes.test_optimizers import steps, tiny_moe, whole

DECAY = 0.9


def averaged(folder: Path) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights after each step, the averages in the end, and the weights after the averaged ones were exported."""
    state = init_parallel_state(dp_shard=2, device_type="cpu")
    model: nn.Module = build_parallelize_model(tiny_moe(), state, mode="fsdp2")
    optimizer = build_optimizer(model, lr=1e-2, optimizer="muon", muon={"ns_dtype": "float32"})
    history = []
    for step in range(4):
        steps(model, optimizer, step, step + 1, state, ema=DECAY)
        history.append({name: whole(p) for name, p in model.named_parameters()})
    averages = {name: whole(optimizer.state[p]["ema"]) for name, p in model.named_parameters()}
    for p in model.parameters():
        assert local(optimizer.state[p]["ema"]).shape == local(p).shape  # a shard, as the parameter
    with ema_weights(optimizer):
        export_hf(model, folder)
    assert all(torch.equal(whole(optimizer.state[p]["ema"]), averages[name]) for name, p in model.named_parameters())
    return history, averages, {name: whole(p) for name, p in model.named_parameters()}


def test_the_average_is_the_one_that_is_computed_by_hand_and_is_exported(tmp_path: Path, two_ranks: Ranks) -> None:
    history, averages, after = two_ranks.run(averaged, tmp_path, timeout=200)[0]
    exported = type(tiny_moe()).from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name in averages:
        by_hand = history[0][name]
        for weights in history[1:]:
            by_hand = torch.lerp(by_hand, weights[name], 1 - DECAY)
        assert torch.equal(averages[name], by_hand), name
        assert torch.equal(exported[name], averages[name]), name
        assert torch.equal(after[name], history[-1][name]), name
        assert not torch.equal(averages[name], after[name]), name


def test_without_a_decay_averages_of_a_checkpoint_are_let_go() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, lr=1e-2)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    update_ema(optimizer, DECAY)
    assert "ema" in optimizer.state[model.weight]
    update_ema(optimizer, None)
    assert "ema" not in optimizer.state[model.weight]
    before = model.weight.clone()
    with ema_weights(optimizer):
        assert torch.equal(model.weight, before)


def test_weights_are_put_back_when_the_export_fails() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, lr=1e-2)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        update_ema(optimizer, DECAY)
    before = model.weight.clone()

    def export() -> None:
        with ema_weights(optimizer):
            assert not torch.equal(model.weight, before)
            raise OSError("disk is full")

    with pytest.raises(OSError, match="disk"):
        export()
    assert torch.equal(model.weight, before)


def test_a_run_with_muon_and_averaged_weights_goes_on_and_exports_as_if_it_was_not_stopped(
    arguments: list[str], tmp_path: Path
) -> None:
    command = [*arguments, "--train.optimizer=muon", "--train.ema_decay=0.5", "--train.max_steps=4"]
    command += ["--train.save_hf_weights=true", "--train.lr_decay_style=wsd", "--train.save_epochs=1"]
    train_omni_model.main([*command, f"--train.output_dir={tmp_path}/whole"])
    train_omni_model.main([*command, f"--train.output_dir={tmp_path}/run", "--train.save_steps=2"])
    (tmp_path / "run" / "checkpoints" / "global_step_4").rename(tmp_path / "aside")
    train_omni_model.main([*command, f"--train.output_dir={tmp_path}/run", "--train.load_checkpoint_path=auto"])
    whole, run = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "run"))
    assert run == whole
    dcp_to_hf(tmp_path / "aside", tmp_path / "raw")
    folders = [tmp_path / "whole" / "hf_ckpt", tmp_path / "run" / "hf_ckpt", tmp_path / "raw"]
    averages, again, raw = (load_file(folder / "model.safetensors") for folder in folders)
    assert averages.keys() == again.keys() == raw.keys()
    for name, value in averages.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, raw[name]), f"{name} has the weights themselves"
