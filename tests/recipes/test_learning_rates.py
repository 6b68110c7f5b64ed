"""Learning rates of parts, and parameters that keep their values, by globs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ranks import Ranks
from torch import nn
from veomni_config import ConfigError, OmniRecipeConfig, parse_args
from veomni_models import OmniModel
from veomni_recipes.optimization import build_optimizer, set_learning_rate
from veomni_recipes.run_folder import read_metrics
from veomni_recipes.tasks.omni import train_omni_model


def train(arguments: list[str]) -> None:
    train_omni_model.main(arguments)


def test_groups_follow_the_schedule_in_proportion_to_their_peaks() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "tower": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))})
    optimizer = build_optimizer(
        model, lr=0.1, weight_decay=0.5, no_decay_params=["bias"], param_lrs={"tower.*": 0.01, "tower.1.*": 0.2}
    )
    set_learning_rate(optimizer, 0.05)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, p in model.named_parameters()
        if any(p is own for own in group["params"])
    }
    assert found["head.weight"] == pytest.approx((0.05, 0.5))
    assert found["head.bias"] == pytest.approx((0.05, 0.0))
    assert found["tower.0.weight"] == pytest.approx((0.005, 0.5))
    assert found["tower.1.bias"] == pytest.approx((0.1, 0.0))


@pytest.mark.parametrize("mode", ["fsdp2", pytest.param("fsdp1", marks=pytest.mark.slow)])
def test_parts_learn_at_their_own_rates_or_not_at_all(
    mode: str, arguments: list[str], tmp_path: Path, two_ranks: Ranks
) -> None:
    command = [*arguments, "--train.save_hf_weights=true", "--train.max_steps=2", f"--train.data_parallel_mode={mode}"]
    if mode == "fsdp1":
        command.append("--train.init_device=cpu")
    changes = ["--train.vit_lr=0", "--train.param_lrs={projectors.*: 3e-4}", "--train.freeze_params=[foundation.lm_*]"]
    two_ranks.run(train, [*command, f"--train.output_dir={tmp_path}/start", "--train.lr=0", "--train.lr_min=0"])
    two_ranks.run(train, [*command, f"--train.output_dir={tmp_path}/run", "--train.lr_warmup_ratio=0", *changes])
    before, after = (OmniModel.from_pretrained(tmp_path / name / "hf_ckpt").state_dict() for name in ("start", "run"))
    moved = {name: (before[name] - after[name]).abs().max().item() for name in before}
    assert max(value for name, value in moved.items() if name.startswith(("encoders", "foundation.lm_head"))) == 0
    # Adam's first steps are as long as the learning rate, which decays from 1.5e-3 and from 3e-4
    largest = {part: max(v for n, v in moved.items() if n.startswith(part)) for part in ("projectors", "foundation")}
    assert largest["foundation"] / largest["projectors"] == pytest.approx(5, rel=0.3)


def test_a_run_with_rates_of_parts_goes_on_as_if_it_was_not_stopped(arguments: list[str], tmp_path: Path) -> None:
    command = [*arguments, "--train.vit_lr=1e-2", "--train.param_lrs={projectors.*: 3e-3}", "--train.max_steps=6"]
    train([*command, f"--train.output_dir={tmp_path}/whole"])
    train([*command, f"--train.output_dir={tmp_path}/run", "--train.save_steps=3"])
    last = tmp_path / "run" / "checkpoints" / "global_step_6"
    last.rename(tmp_path / "aside")
    train([*command, f"--train.output_dir={tmp_path}/run", "--train.load_checkpoint_path=auto"])
    whole, run = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "run"))
    assert run == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--train.param_lrs={towers.*: 1e-3}", r"train.param_lrs: 'towers.\*' matches no parameter .*encoders.image"),
        ("--train.freeze_params=[encoder.*]", r"train.freeze_params: 'encoder.\*' matches no parameter"),
        ("--train.freeze_params=['*']", "train.freeze_params: nothing would learn"),
    ],
)
def test_globs_that_cannot_be_meant_are_refused(
    change: str, message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train([*arguments, change, f"--train.output_dir={tmp_path}/run"])
    assert re.search(message, capsys.readouterr().err)


def test_a_rate_of_a_part_needs_one_of_the_whole(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"set train\.lr above 0"):
        parse_args(OmniRecipeConfig, [*arguments, "--train.output_dir=x", "--train.lr=0", "--train.vit_lr=1e-5"])
