"""All ranks go on, or all ranks raise: a rank that fails alone would leave the others waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from veomni_ckpt.errors import CheckpointError

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group stands, so that there are ranks to agree with."""
    return dist.is_available() and dist.is_initialized()


def describe(error: BaseException) -> str:
    """One line for an exception; of DCP's collected failures the first, with its rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"rank {rank}: {describe(cause)}"
    if isinstance(error, CheckpointError):
        return str(error)
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def agree(
    error: BaseException | None,
    group: dist.ProcessGroup | None = None,
    *,
    kind: type[CheckpointError] = CheckpointError,
    context: str = "",
) -> None:
    """Tell all ranks of `group` (None: the default group) whether this rank failed.

    A collective. Without a process group only this process counts.

    Raises:
        CheckpointError: on every rank, of class `kind`, if any rank handed in an error; `context` begins the sentence.
    """
    mine = None if error is None else describe(error)
    if not is_distributed():
        if mine is not None:
            raise kind(context + mine) from error
        return
    messages: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, mine, group=group)
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if failed:
        rank, message = failed[0]
        alone = len(failed) < len(messages) and not message.startswith("rank ")
        raise kind(context + (f"rank {rank}: " if alone else "") + message) from error


def is_first(group: dist.ProcessGroup | None) -> bool:
    """Whether this is the rank that writes what all have in common."""
    return group is None or dist.get_rank(group) == 0


def from_first(group: dist.ProcessGroup | None, act: Callable[[], T], *, context: str = "") -> T:
    """What `act` returns on rank 0, which alone calls it: a small value that can be pickled.

    A collective.

    Raises:
        CheckpointError: on every rank, if it raised.
    """
    answer: list[Any] = [None]
    failure: Exception | None = None
    if is_first(group):
        try:
            answer = [act()]
        except Exception as error:
            failure = error
    agree(failure, group, context=context)
    if group is not None:
        dist.broadcast_object_list(answer, src=0, group=group)
    value: T = answer[0]
    return value


def gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """The value of every rank, in their order. A collective."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
