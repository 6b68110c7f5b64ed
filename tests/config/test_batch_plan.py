"""How a step is dealt to ranks and how many steps there are, against tables worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from veomni_config import BatchPlan, ConfigError, RecipeConfig

# keys; world size; dp, replicate, shard, global batch, accumulation, tokens a step
DEALT: list[tuple[dict[str, Any], int, tuple[int, ...]]] = [
    ({}, 1, (1, 1, 1, 1, 1, 2048)),
    ({}, 8, (8, 8, 1, 8, 1, 16384)),
    ({"data_parallel_mode": "fsdp2"}, 8, (8, 1, 8, 8, 1, 16384)),
    ({"data_parallel_mode": "fsdp2", "data_parallel_replicate_size": 2}, 8, (8, 2, 4, 8, 1, 16384)),
    ({"data_parallel_mode": "fsdp2", "data_parallel_shard_size": 2}, 8, (8, 4, 2, 8, 1, 16384)),
    ({"ulysses_parallel_size": 2, "micro_batch_size": 2, "global_batch_size": 32}, 8, (4, 4, 1, 32, 4, 65536)),
    ({"ulysses_parallel_size": 2, "tensor_parallel_size": 2}, 16, (4, 4, 1, 4, 1, 8192)),
    ({"micro_batch_size": 4, "dyn_bsz_margin": 192}, 2, (2, 2, 1, 8, 1, 16000)),
    ({"data_parallel_mode": "fsdp2", "expert_parallel_size": 4, "ulysses_parallel_size": 2}, 8, (4, 1, 4, 4, 1, 8192)),
]

# keys of train; keys of data; world size; samples; steps an epoch, steps in all
STEPS: list[tuple[dict[str, Any], dict[str, Any], int, int | None, tuple[int | None, int | None]]] = [
    ({}, {"train_size": 1_000_000}, 1, None, (489, 489)),  # 1,000,000 / 2,048 = 488.28
    ({}, {"train_size": 2048 * 8}, 8, None, (1, 1)),
    ({}, {"train_size": 2048 * 8 + 1}, 8, None, (2, 2)),
    ({"bsz_warmup_ratio": 0.1}, {"train_size": 204_800}, 1, None, (105, 105)),  # 204,800 x 1.05 / 2,048 = 105
    ({"dyn_bsz_margin": 48}, {"train_size": 20_000}, 1, None, (10, 10)),  # of 2,000 tokens
    ({"rmpad": False, "num_train_epochs": 3}, {"train_size": 4096}, 1, None, (2, 6)),
    ({"max_steps": 5, "num_train_epochs": 2}, {}, 1, None, (5, 10)),
    ({"dyn_bsz": False}, {}, 4, 103, (25, 25)),
    ({"dyn_bsz": False}, {"drop_last": False}, 4, 103, (26, 26)),
    ({"dyn_bsz": False, "global_batch_size": 16, "max_steps": 4}, {}, 4, 103, (4, 4)),
    ({"dyn_bsz": False}, {}, 4, None, (None, None)),
    ({"dyn_bsz": False, "max_steps": 7}, {}, 4, None, (7, 7)),
]


def config(train: dict[str, Any], data: dict[str, Any] | None = None) -> RecipeConfig:
    return RecipeConfig.model_validate(
        {
            "model": {"config_path": "cfg"},
            "data": {"train_path": "d"} | (data or {}),
            "train": {"output_dir": "out"} | train,
        }
    )


def dealt(plan: BatchPlan) -> tuple[int, ...]:
    batches = (plan.global_batch_size, plan.accumulation, plan.tokens_per_step)
    return (plan.dp, plan.dp_replicate, plan.dp_shard, *batches)


@pytest.mark.parametrize(("train", "world_size", "expected"), DEALT)
def test_a_step_is_dealt_to_the_ranks(train: dict[str, Any], world_size: int, expected: tuple[int, ...]) -> None:
    assert dealt(config(train).batch_plan(world_size)) == expected


@pytest.mark.parametrize(("train", "data", "world_size", "samples", "expected"), STEPS)
def test_the_steps_follow_the_tokens_or_the_samples(
    train: dict[str, Any],
    data: dict[str, Any],
    world_size: int,
    samples: int | None,
    expected: tuple[int | None, int | None],
) -> None:
    plan = config(train, data).batch_plan(world_size, samples)
    assert (plan.steps_per_epoch, plan.total_steps) == expected
    if plan.steps_per_epoch is not None:
        assert config(train, data).compute_train_steps(world_size, samples) == plan.steps_per_epoch


def test_the_steps_agree_with_the_reference_systems_formula() -> None:
    cfg = config(
        {"micro_batch_size": 2, "global_batch_size": 64, "dyn_bsz_margin": 96, "bsz_warmup_ratio": 0.007},
        {"train_size": 80_000_000, "max_seq_len": 4096},
    )
    expected = 80_000_000 * (1 + 0.007 / 2) / (64 * 4096 * (1 - 96 / (2 * 4096)))
    assert cfg.compute_train_steps(8) == int(expected) + 1


@pytest.mark.parametrize(
    ("train", "world_size", "message"),
    [
        (
            {"ulysses_parallel_size": 2},
            7,
            "train.ulysses_parallel_size: world size 7 is no multiple of train.ulysses_parallel_size=2: "
            "set the world size to 6 or 8, or train.ulysses_parallel_size to 1 or 7",
        ),
        (
            {"ulysses_parallel_size": 4, "tensor_parallel_size": 2},
            4,
            "train.ulysses_parallel_size: world size 4 is no multiple of train.ulysses_parallel_size=4 x "
            "train.tensor_parallel_size=2: set the world size to 8, or train.ulysses_parallel_size to 1 or 2",
        ),
        (
            {"micro_batch_size": 2, "global_batch_size": 6, "ulysses_parallel_size": 2},
            8,
            "train.global_batch_size: 6 is no multiple of train.micro_batch_size=2 times the data-parallel size 4 "
            "(world size 8 / train.ulysses_parallel_size=2): set train.global_batch_size to 8",
        ),
        (
            {"data_parallel_mode": "fsdp2", "data_parallel_replicate_size": 2, "data_parallel_shard_size": 2},
            8,
            "train.data_parallel_replicate_size: train.data_parallel_replicate_size=2 x "
            "train.data_parallel_shard_size=2 does not make the data-parallel size 8 (world size 8): "
            "leave one of the two sizes at -1 and set the other to a divisor of 8",
        ),
        (
            {"data_parallel_mode": "fsdp2", "expert_parallel_size": 3},
            4,
            "train.expert_parallel_size: 3 does not divide the 4 ranks that share a copy of the model "
            "(train.data_parallel_shard_size 4 x train.ulysses_parallel_size 1, world size 4): "
            "set train.expert_parallel_size to 1 or 2 or 4",
        ),
        (
            {"data_parallel_replicate_size": 3},
            8,
            "train.data_parallel_replicate_size: train.data_parallel_replicate_size=3 does not make the data-parallel "
            "size 8 (world size 8): with ddp every rank is a replica, set train.data_parallel_replicate_size to 8 "
            "or -1",
        ),
        (
            {"ulysses_parallel_size": 7},
            360,
            "train.ulysses_parallel_size: world size 360 is no multiple of train.ulysses_parallel_size=7: "
            "set the world size to 357 or 364, or train.ulysses_parallel_size to 5 or 6 or 8 or 9",
        ),
        ({}, 2.0, "world size 2.0 given; allowed: a whole number >= 1"),
        ({}, 0, "world size 0 given; allowed: a whole number >= 1"),
    ],
)
def test_sizes_that_do_not_divide_are_told_with_sizes_that_do(
    train: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(train).batch_plan(world_size)
    assert str(caught.value) == message


def test_all_sizes_that_do_not_divide_are_told_at_once() -> None:
    train = {"data_parallel_mode": "fsdp2", "expert_parallel_size": 3, "global_batch_size": 9}
    with pytest.raises(ConfigError) as caught:
        config(train).batch_plan(4)
    assert [problem.key for problem in caught.value.problems] == [
        "train.expert_parallel_size",
        "train.global_batch_size",
    ]
    with pytest.raises(ConfigError, match=r"^number of samples -1 given; allowed: a whole number >= 0$"):
        config({}).batch_plan(4, samples=-1)


def test_too_few_samples_for_one_step_are_told() -> None:
    with pytest.raises(
        ConfigError, match=r"10 samples do not fill one step of 16 rows: set train\.global_batch_size to 8"
    ):
        config({"dyn_bsz": False, "global_batch_size": 16}).batch_plan(4, samples=10)


def test_steps_that_follow_from_unknown_samples_are_not_invented() -> None:
    with pytest.raises(ConfigError, match=r"train\.dyn_bsz: .*number of samples"):
        config({"dyn_bsz": False}).compute_train_steps(4)


def test_the_mesh_sizes_make_the_plans_sizes() -> None:
    for train, world_size, (dp, replicate, shard, *_) in DEALT:
        sizes = config(train).train.parallel_sizes()
        rest = sizes["ulysses"] * sizes["cp"] * sizes["tp"] * sizes["pp"]
        assert dp * rest == world_size
        assert sizes["dp_replicate"] in (-1, replicate)
        assert sizes["dp_shard"] in (-1, shard)
        assert (sizes["dp_replicate"], sizes["dp_shard"]) != (-1, -1)
