"""Copies of the state in host memory, so that training goes on while they are written."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class Staging:
    """Buffers in host memory that are filled anew for every save, as long as the model's tensors are the same."""

    def __init__(self) -> None:
        on_cuda = torch.cuda.is_available()
        # DefaultStager's own defaults assert on a machine without an accelerator
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_cuda,
            )
        )

    def stage(self, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
        """A copy of a nested dict of tensors; FSDP1's ShardedTensors come into new memory and belong to `group`."""
        sharded, others = _divide(tensors)
        staged: dict[str, Any] = self._stager.stage(others)
        _merge_copies(staged, sharded, group)
        return staged

    def close(self) -> None:
        """Let go of the buffers."""
        self._stager.close()


def _divide(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ShardedTensors, which DefaultStager cannot copy, and the rest, both nested as before."""
    sharded: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for key, value in tensors.items():
        if isinstance(value, dict):
            sharded[key], others[key] = _divide(value)
        else:
            (sharded if isinstance(value, ShardedTensor) else others)[key] = value
    return sharded, others


def _merge_copies(staged: dict[str, Any], sharded: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    for key, value in sharded.items():
        if isinstance(value, dict):
            _merge_copies(staged[key], value, group)
        else:
            moved = value.cpu(process_group=group)
            staged[key] = copy.deepcopy(value) if moved is value else moved
