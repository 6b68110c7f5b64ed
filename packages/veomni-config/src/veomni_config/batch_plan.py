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
    dp = _data_parallel_size(train, world_size)
    replicate, shard = _replicas_and_shards(train, dp, world_size)
    _check_expert_groups(train, shard, world_size)
    micro = train.micro_batch_size
    rows = micro * dp
    global_batch = train.global_batch_size or rows
    if global_batch % rows:
        right = " or ".join(str(value) for value in _multiples_around(global_batch, rows))
        raise _error(
            "global_batch_size",
            f"{global_batch} is no multiple of train.micro_batch_size={micro} times the data-parallel size {dp} "
            f"(world size {world_size}{_divided_by(train)}): set train.global_batch_size to {right}",
        )
    accumulation = global_batch // rows
    budget = micro * data.max_seq_len - train.dyn_bsz_margin
    if budget < 1:
        raise _error("dyn_bsz_margin", f"{train.dyn_bsz_margin} leaves nothing of {micro} x {data.max_seq_len} tokens")
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
            raise _error(
                "global_batch_size",
                f"{samples} samples do not fill one step of {global_batch} rows: set {smaller}data.drop_last to false",
            )
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


def _data_parallel_size(train: TrainConfig, world_size: int) -> int:
    if world_size < 1:
        raise _error("", f"world size {world_size} given; allowed: a whole number >= 1")
    sizes = {key: getattr(train, key) for key in _SPLITTING}
    ranks = math.prod(sizes.values())
    if world_size % ranks:
        key = max(sizes, key=lambda name: int(sizes[name]))
        involved = " x ".join(f"train.{name}={size}" for name, size in sizes.items() if size > 1)
        worlds = " or ".join(str(value) for value in _multiples_around(world_size, ranks))
        others = ranks // sizes[key]
        fits = [size for size in range(1, min(world_size, _MOST_RANKS) + 1) if world_size % (size * others) == 0]
        change = f", or train.{key} to {' or '.join(map(str, fits))}" if fits else ""
        raise _error(
            key, f"world size {world_size} is no multiple of {involved}: set the world size to {worlds}{change}"
        )
    return world_size // ranks


def _replicas_and_shards(train: TrainConfig, dp: int, world_size: int) -> tuple[int, int]:
    sizes = train.parallel_sizes()
    replicate, shard = sizes["dp_replicate"], sizes["dp_shard"]
    given = " x ".join(
        f"train.data_parallel_{name}_size={size}"
        for name, size in (("replicate", replicate), ("shard", shard))
        if size != -1
    )
    known = max(replicate, 1) * max(shard, 1)
    if dp % known or (known != dp and -1 not in (replicate, shard)):
        key = "data_parallel_replicate_size" if replicate > 1 else "data_parallel_shard_size"
        raise _error(
            key,
            f"{given} does not make the data-parallel size {dp} (world size {world_size}{_divided_by(train)}): "
            f"leave one of the two sizes at -1 and set the other to a divisor of {dp}",
        )
    return (dp // shard if replicate == -1 else replicate), (dp // replicate if shard == -1 else shard)


def _check_expert_groups(train: TrainConfig, shard: int, world_size: int) -> None:
    ranks = shard * train.ulysses_parallel_size * train.context_parallel_size
    size = train.expert_parallel_size
    if ranks % size:
        fits = " or ".join(str(value) for value in range(1, min(ranks, _MOST_RANKS) + 1) if ranks % value == 0)
        raise _error(
            "expert_parallel_size",
            f"{size} does not divide the {ranks} ranks that share a copy of the model (train.data_parallel_shard_size "
            f"{shard} x train.ulysses_parallel_size {train.ulysses_parallel_size}, world size {world_size}): "
            f"set train.expert_parallel_size to {fits}",
        )


def _divided_by(train: TrainConfig) -> str:
    return "".join(f" / train.{key}={getattr(train, key)}" for key in _SPLITTING if getattr(train, key) > 1)


def _multiples_around(value: int, base: int) -> list[int]:
    return sorted({size for size in (value // base * base, -(-value // base) * base) if size})


def _error(key: str, text: str) -> ConfigError:
    return ConfigError([Problem(f"train.{key}" if key else "", text)])
