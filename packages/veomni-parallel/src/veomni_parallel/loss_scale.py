"""Losses and counts over all ranks: what turns a local sum into the gradient of the whole step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from veomni_parallel.errors import ParallelError
from veomni_parallel.mesh import Mesh, ParallelState

T = TypeVar("T", int, float, torch.Tensor)


def loss_scale(state: ParallelState) -> float:
    """Factor for a rank's loss before `backward`.

    A rank's loss is (sum over its own tokens) / (targets of the whole step on all ranks). The wrappers average the
    gradients of all dp x sp ranks, whereas the gradient of the step is their sum: the factor undoes the division.
    """
    return float(state.loss.size())


def global_sum(value: T, mesh: Mesh) -> T:
    """Sum `value` over the ranks of a one-dimensional mesh; the same on all of them, and of the kind that was given.

    Integers are exact (64 bits), floats are summed in double precision, a tensor keeps shape and dtype; `value` itself
    is not changed and no gradient flows.
    """
    if isinstance(value, torch.Tensor):
        total = value.detach().clone()
    else:
        dtype = torch.int64 if isinstance(value, int) else torch.float64
        total = torch.tensor(value, dtype=dtype, device=mesh.device_type)
    if mesh.size() > 1:
        dist.all_reduce(total, group=mesh.get_group())
    return total if isinstance(value, torch.Tensor) else total.item()


def count_targets(micro_batches: Iterable[Mapping[str, Any]]) -> int:
    """Number of positions with a target (`shift_labels != -100`) in the whole rows of this rank's micro-batches.

    Call it before a row is sliced over Ulysses ranks, and sum the result over `state.dp`.

    Raises:
        ParallelError: a micro-batch has no `shift_labels`.
    """
    count = 0
    for index, batch in enumerate(micro_batches):
        if "shift_labels" not in batch:
            raise ParallelError(
                f'Micro-batch {index} has no "shift_labels" (the target of each position, -100 where there is none);'
                f" it has {sorted(batch)}."
            )
        count += int((batch["shift_labels"] != -100).sum())
    return count
