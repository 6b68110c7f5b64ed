"""Shards that are several pieces of a tensor, as DCP's planners take them.

Tensor parallelism divides a joined weight (gate and up projection in one) so that each rank holds a part of each half:
rows that do not lie next to each other, of which DCP's own plan for a DTensor makes one piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from veomni_ckpt.local_pieces import local_pieces


def with_pieces(tree: Any) -> Any:
    """The state with each tensor of such shards replaced by its pieces, which share its memory."""
    if isinstance(tree, dict):
        return {key: with_pieces(value) for key, value in tree.items()}
    if isinstance(tree, DTensor) and any(isinstance(placement, _StridedShard) for placement in tree.placements):
        return Pieces(tree)
    return tree


class Pieces(torch.Tensor):
    """What DCP asks of a tensor that knows its own pieces: its protocol of double-underscored methods."""

    @staticmethod
    def __new__(cls, tensor: DTensor) -> Pieces:
        """A tensor of the whole shape, without memory of its own."""
        return torch.Tensor._make_wrapper_subclass(cls, tensor.size(), dtype=tensor.dtype, device=tensor.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(f"{func} cannot be computed on pieces of a tensor, which are there to be saved and loaded")

    def __init__(self, tensor: DTensor) -> None:
        self.pieces = {torch.Size(first for first, _ in box): piece for box, piece in local_pieces(tensor)}

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, piece.size()) for offsets, piece in self.pieces.items()]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(piece), self.size()),
            )
            for chunk, piece in zip(self._chunks(), self.pieces.values(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[torch.Size(index.offset or ())]
