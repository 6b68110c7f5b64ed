"""What a model that works on whole rows needs to know where several ranks share each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from veomni_parallel.all_to_all import all_to_all
from veomni_parallel.mesh import Mesh

ATTRIBUTE = "shared_sequence"


@dataclass(frozen=True)
class SharedSequence:
    """The ranks of a row, for models that compute on the decoder's states, such as those that draw pictures by them.

    Attributes:
        group: the process group of these ranks.
        rank, size: of this one among them.
    """

    group: Any
    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSequence:
        return self  # a process group cannot be copied

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's slice of something of the whole row: [B, T, ...] -> [B, T_own, ...]."""
        return x.tensor_split(self.size, dim=1)[self.rank]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """What all ranks have, in their order, on each: [n_own, ...] -> [n, ...]; gradients are summed over ranks."""
        count = torch.tensor([len(x)], device=x.device)
        counts = [torch.empty_like(count) for _ in range(self.size)]
        dist.all_gather(counts, count, group=self.group)
        return all_to_all(torch.cat([x] * self.size), [len(x)] * self.size, [int(n) for n in counts], self.group)


def share_sequence(model: nn.Module, mesh: Mesh) -> None:
    """Give the models in `model` that have an attribute `shared_sequence` theirs."""
    for module in model.modules():
        if hasattr(type(module), ATTRIBUTE):
            setattr(module, ATTRIBUTE, SharedSequence(mesh.get_group(), mesh.get_local_rank(), mesh.size()))
