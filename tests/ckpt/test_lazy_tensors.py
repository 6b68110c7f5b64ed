"""`LazyTensor`: the operations of transformers' conversions, whole and by boxes, and how much is fetched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from veomni_ckpt.lazy_tensors import Box, LazyTensor, box_sizes, row_blocks, slices, whole_box

Tensors = list[torch.Tensor]
OPERATIONS: dict[str, Callable[[Tensors], torch.Tensor]] = {
    "stack": lambda x: torch.stack(x),
    "stack last": lambda x: torch.stack(x, dim=-1),
    "cat": lambda x: torch.cat(x, dim=1),
    "experts": lambda x: torch.cat([torch.stack(x), torch.stack(x[::-1])], dim=1),
    "chunk": lambda x: torch.chunk(torch.stack(x, 1), 3, dim=1)[1].squeeze(1),
    "split": lambda x: torch.split(torch.cat(x), [5, 6, 7])[1],
    "transpose": lambda x: torch.stack(x).transpose(1, 2).contiguous()[1:],
    "T": lambda x: x[0].T.contiguous(),
    "permute": lambda x: torch.stack(x).permute(2, 0, 1)[1:3],
    "interleave": lambda x: torch.stack(x).reshape(3, 3, 2, 4).transpose(1, 2).reshape(3, 6, 4).contiguous(),
    "rope": lambda x: x[0].view(2, 3, 4).transpose(0, 1).reshape(6, 4),
    "unbind": lambda x: torch.unbind(torch.stack(x, dim=-1), dim=-1)[2],
    "index": lambda x: x[0][2],
    "all": lambda x: x[0][...],
    "arithmetic": lambda x: (x[0] + x[1])[1:3],
    "cast": lambda x: x[0].to(torch.bfloat16),
    "steps": lambda x: x[0][::2],
    "flatten": lambda x: x[0].flatten(),
}


def lazy(tensor: torch.Tensor, fetched: list[int] | None = None) -> LazyTensor:
    def fetch(box: Box, out: torch.Tensor) -> None:
        if fetched is not None:
            fetched.append(out.numel())
        out.copy_(tensor[slices(box)])

    return LazyTensor(tensor.shape, tensor.dtype, fetch)


@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_an_operation_gives_what_it_gives_on_tensors(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    expected = OPERATIONS[name](tensors)
    got = OPERATIONS[name]([lazy(tensor) for tensor in tensors])
    assert isinstance(got, LazyTensor)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    boxes = [whole_box(expected.shape)]
    for _ in range(20):
        firsts = [int(torch.randint(0, size, (), generator=generator)) for size in expected.shape]
        pairs = zip(firsts, expected.shape, strict=True)
        boxes.append(tuple((f, int(torch.randint(1, size - f + 1, (), generator=generator))) for f, size in pairs))
    for box in boxes:
        out = torch.empty(box_sizes(box), dtype=got.dtype)
        got.fetch(box, out)
        assert torch.equal(out, expected[slices(box)])


@torch.no_grad()
def test_a_box_fetches_no_more_than_it_needs() -> None:
    fetched: list[int] = []
    experts = [lazy(torch.randn(6, 4), fetched) for _ in range(8)]
    merged = torch.cat([torch.stack(experts), torch.stack(experts)], dim=1)  # [8, 12, 4]
    merged.fetch(((2, 2), (4, 4), (1, 2)), torch.empty(2, 4, 2))
    assert sum(fetched) == 2 * 4 * 2
    fetched.clear()
    interleaved = lazy(torch.randn(8, 6, 4), fetched).reshape(8, 3, 2, 4).transpose(1, 2).reshape(8, 6, 4)
    interleaved.fetch(((2, 3), (0, 1), (1, 2)), torch.empty(3, 1, 2))
    assert sum(fetched) == 3 * 6 * 2  # whole only in the dimension that is taken apart


def test_blocks_of_rows_follow_each_other_and_keep_to_the_limit() -> None:
    shape = (5, 7, 3)
    whole = torch.arange(105).reshape(shape)
    for limit in (1, 3, 8, 21, 50, 105):
        blocks = row_blocks(whole_box(shape), 105, limit)
        assert torch.equal(torch.cat([whole[slices(block)].flatten() for block in blocks]), whole.flatten())
        assert all(torch.Size(box_sizes(block)).numel() <= limit for block in blocks)
