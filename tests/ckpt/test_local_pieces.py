"""`local_pieces`: every rank's boxes against torch's own division of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from veomni_ckpt import CheckpointError
from veomni_ckpt.lazy_tensors import slices
from veomni_ckpt.local_pieces import local_pieces


@pytest.fixture(params=range(4))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of four ranks, without the others."""
    dist.init_process_group("fake", rank=request.param, world_size=4, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("sizes", "placements"),
    [
        ((4,), [Shard(0)]),
        ((4,), [Shard(-1)]),
        ((4,), [_StridedShard(1, split_factor=2)]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((2, 2), [Shard(1), Shard(0)]),
        ((2, 2), [Shard(0), Shard(0)]),
        ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),  # FSDP2 over tensor parallelism
        ((2, 2), [Shard(2), _StridedShard(1, split_factor=2)]),  # experts: packed gate and up
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(8, 16, 6), (7, 16, 5), (2, 8, 3), (0, 8, 4)], ids=str)
def test_pieces_are_the_local_part_at_its_place(
    rank: int, shape: tuple[int, ...], sizes: tuple[int, ...], placements: list[Any]
) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    mesh = init_device_mesh("cpu", sizes)
    sharded = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    pieces = local_pieces(sharded)
    for box, piece in pieces:
        assert torch.equal(whole[slices(box)], piece)
        assert (
            piece.numel() == 0 or piece.untyped_storage().data_ptr() == sharded.to_local().untyped_storage().data_ptr()
        )
    assert sum(piece.numel() for _, piece in pieces) == sharded.to_local().numel()


def test_what_belongs_to_no_rank_is_refused(rank: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    with pytest.raises(CheckpointError, match="partial sums"):
        local_pieces(DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False))
    lying = DTensor.from_local(
        torch.ones(3, 2), mesh, [Shard(0)], run_check=False, shape=torch.Size((8, 2)), stride=(2, 1)
    )
    with pytest.raises(CheckpointError, match=r"has \[3, 2\] here, not \[2, 2\]"):
        local_pieces(lying)
