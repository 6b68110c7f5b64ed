"""How the rows of an optimizer step are dealt to ranks, and how many steps there are: plain arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from .data import DataConfig
from .errors import ConfigError, Problem
from .train import TrainConfig


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What `plan_batches` derives. Tokens and rows are those of all ranks together.

    `steps_per_epoch` and `total_steps` are None when they follow from the number of samples and that was not given.
    """

    world_size: int
    dp: int
    dp_replicate: int
    dp_shard: int
    micro_batch_size: int
    global_batch_size: int
    accumulation: int
    tokens_per_step: int
    steps_per_epoch: int | None
    total_steps: int | None


def plan_batches(train: TrainConfig, data: DataConfig, world_size: int, samples: int | None = None) -> BatchPlan:
    """Derive the batches of a run on `world_size` ranks.

    ::

        dp = world_size / (ulysses * context * tensor * pipeline)       = dp_replicate * dp_shard
        global_batch_size  = micro_batch_size * dp * accumulation       (accumulation 1 if not given)
        tokens_per_step    = dp * accumulation * (micro_batch_size * max_seq_len - dyn_bsz_margin)
        steps_per_epoch    = ceil(train_size * (1 + bsz_warmup_ratio / 2) / tokens_per_step)      with dyn_bsz
                           = floor(samples / global_batch_size)                                   without
        total_steps        = min(steps_per_epoch, max_steps) * num_train_epochs

    `tokens_per_step` is the budget at full size. `samples` is the number of training samples of an epoch; token
    budgets do not need it, their steps follow `data.train_size`. Without `data.drop_last` the last incomplete step
    counts (ceil instead of floor). Raises ConfigError, naming every size involved, where something does not divide.
    """
    for name, count, least in (("world size", world_size, 1), ("number of samples", samples, 0)):
        if count is not None and (type(count) is not int or count < least):
            raise ConfigError([Problem("", f"{name} {count!r} given; allowed: a whole number >= {least}")])
    micro = train.micro_batch_size
    budget = micro * data.max_seq_len - train.dyn_bsz_margin
    problems: list[Problem] = []
    if budget < 1:
        margin = f"{train.dyn_bsz_margin} leaves nothing of {micro} x {data.max_seq_len} tokens"
        problems.append(_problem("dyn_bsz_margin", margin))
    ranks = math.prod(getattr(train, key) for key in _SPLITTING)
    if world_size % ranks:
        raise ConfigError([*problems, _undivided_world(train, world_size, ranks)])
    dp = world_size // ranks
    sizes = train.parallel_sizes()
    replicate, shard = sizes["dp_replicate"], sizes["dp_shard"]
    known = max(replicate, 1) * max(shard, 1)
    if dp % known or (known != dp and -1 not in (replicate, shard)):
        problems.append(_uneven_replicas(train, dp, world_size))
    else:
        replicate = dp // shard if replicate == -1 else replicate
        shard = dp // replicate if shard == -1 else shard
        problems += _expert_groups(train, shard, world_size)
    rows = micro * dp
    global_batch = train.global_batch_size or rows
    if global_batch % rows:
        right = " or ".join(str(value) for value in _multiples_around(global_batch, rows))
        text = (
            f"{global_batch} is no multiple of train.micro_batch_size={micro} times the data-parallel size {dp} "
            f"(world size {world_size}{_divided_by(train)}): set train.global_batch_size to {right}"
        )
        problems.append(_problem("global_batch_size", text))
    if problems:
        raise ConfigError(problems)
    accumulation = global_batch // rows
    tokens = dp * accumulation * budget

    steps: int | None
    if train.dyn_bsz:
        warmed = Fraction(data.train_size) * (1 + Fraction(str(train.bsz_warmup_ratio)) / 2)
        steps = math.ceil(warmed / tokens)
    elif samples is None:
        steps = train.max_steps
    else:
        steps = samples // global_batch if data.drop_last else -(-samples // global_batch)
        if steps == 0:
            smaller = f"train.global_batch_size to {samples // rows * rows}, or " if samples >= rows else ""
            text = (
                f"{samples} samples do not fill one step of {global_batch} rows: set {smaller}data.drop_last to false"
            )
            raise ConfigError([_problem("global_batch_size", text)])
    if steps is not None and train.max_steps is not None:
        steps = min(steps, train.max_steps)
    return BatchPlan(
        world_size=world_size,
        dp=dp,
        dp_replicate=replicate,
        dp_shard=shard,
        micro_batch_size=micro,
        global_batch_size=global_batch,
        accumulation=accumulation,
        tokens_per_step=tokens,
        steps_per_epoch=steps,
        total_steps=None if steps is None else steps * train.num_train_epochs,
    )


_MOST_RANKS = 1024  # of a group, in what is proposed
_SPLITTING = ("ulysses_parallel_size", "context_parallel_size", "tensor_parallel_size", "pipeline_parallel_size")


# what a plan for a world size is made from
PLAN_KEYS = (
    *(f"train.{key}" for key in _SPLITTING),
    "train.expert_parallel_size",
    "train.data_parallel_mode",
    "train.data_parallel_replicate_size",
    "train.data_parallel_shard_size",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.dyn_bsz",
    "train.dyn_bsz_margin",
    "train.bsz_warmup_ratio",
    "train.max_steps",
    "train.num_train_epochs",
    "data.max_seq_len",
    "data.train_size",
)


def _undivided_world(train: TrainConfig, world_size: int, ranks: int) -> Problem:
    sizes = {key: getattr(train, key) for key in _SPLITTING}
    key = max(sizes, key=lambda name: int(sizes[name]))
    involved = " x ".join(f"train.{name}={size}" for name, size in sizes.items() if size > 1)
    worlds = " or ".join(str(value) for value in _multiples_around(world_size, ranks))
    others = ranks // sizes[key]
    change = "" if world_size % others else f", or train.{key} to {divisors_near(world_size // others, sizes[key])}"
    return _problem(
        key, f"world size {world_size} is no multiple of {involved}: set the world size to {worlds}{change}"
    )


def _uneven_replicas(train: TrainConfig, dp: int, world_size: int) -> Problem:
    replicate, shard = train.data_parallel_replicate_size, train.data_parallel_shard_size
    sizes = {"train.data_parallel_replicate_size": replicate, "train.data_parallel_shard_size": shard}
    given = " x ".join(f"{key}={size}" for key, size in sizes.items() if size != -1)
    if train.data_parallel_mode == "ddp":
        right = f"with ddp every rank is a replica, set train.data_parallel_replicate_size to {dp} or -1"
    else:
        right = f"leave one of the two sizes at -1 and set the other to a divisor of {dp}"
    return _problem(
        "data_parallel_replicate_size" if replicate > 1 else "data_parallel_shard_size",
        f"{given} does not make the data-parallel size {dp} (world size {world_size}{_divided_by(train)}): {right}",
    )


def _expert_groups(train: TrainConfig, shard: int, world_size: int) -> list[Problem]:
    ranks = shard * train.ulysses_parallel_size * train.context_parallel_size
    size = train.expert_parallel_size
    if ranks % size == 0:
        return []
    text = (
        f"{size} does not divide the {ranks} ranks that share a copy of the model (train.data_parallel_shard_size "
        f"{shard} x train.ulysses_parallel_size {train.ulysses_parallel_size}, world size {world_size}): "
        f"set train.expert_parallel_size to {divisors_near(ranks, size)}"
    )
    return [_problem("expert_parallel_size", text)]


def divisors_near(whole: int, size: int) -> str:
    """The divisors of `whole` that lie nearest to `size`, four at most, in words; none above 1,024 is looked for."""
    divisors = [value for value in range(1, min(whole, _MOST_RANKS) + 1) if whole % value == 0]
    return " or ".join(str(value) for value in sorted(sorted(divisors, key=lambda value: abs(value - size))[:4]))


def _divided_by(train: TrainConfig) -> str:
    return "".join(f" / train.{key}={getattr(train, key)}" for key in _SPLITTING if getattr(train, key) > 1)


def _multiples_around(value: int, base: int) -> list[int]:
    return sorted({size for size in (value // base * base, -(-value // base) * base) if size})


def _problem(key: str, text: str) -> Problem:
    return Problem(f"train.{key}", text)
