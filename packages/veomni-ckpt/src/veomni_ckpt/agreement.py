"""All ranks go on, or all ranks raise: a rank that fails alone would leave the others waiting in a collective."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from veomni_ckpt.errors import CheckpointError


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
