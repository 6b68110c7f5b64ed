"""Tensors that are somewhere else: their shape and element type are known, and any box of them can be fetched.

What only moves elements (stack, cat, split, slice, transpose, reshape, ...) makes a lazy tensor of lazy ones, and a box
of the result fetches no more than it needs. So code that was written for tensors, such as the conversions of names and
weights in transformers, runs on a checkpoint of which a rank reads its part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

# of each dimension: the first index, and the number of indices
Box = tuple[tuple[int, int], ...]
# (box, where to put it): the second is a tensor of the box's sizes, of any strides, element type and device
Fetch = Callable[[Box, torch.Tensor], None]

_OPS = torch.ops.aten


class LazyTensor(torch.Tensor):
    """A tensor without memory of its own, row-major in name.

    Attributes:
        fetch: copies a box of it into a tensor of the box's sizes.
    """

    fetch: Fetch

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, fetch: Fetch) -> LazyTensor:
        """A lazy tensor of a shape and element type."""
        lazy: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device="cpu")
        lazy.fetch = fetch
        return lazy

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, fetch: Fetch) -> None:
        """All is done by `__new__`."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of an operation of torch, lazy itself."""
        handler = _HANDLERS.get(func)
        result = handler(*args, **(kwargs or {})) if handler is not None else None
        return _deferred(func, args, kwargs or {}) if result is None else result

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Shape and element type."""
        return f"LazyTensor({list(self.shape)}, {self.dtype})"


def whole_box(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor of this shape."""
    return tuple((0, size) for size in shape)


def box_sizes(box: Box) -> list[int]:
    """The shape of a box."""
    return [size for _, size in box]


def slices(box: Box) -> tuple[slice, ...]:
    """The box as an index of a tensor in memory."""
    return tuple(slice(first, first + size) for first, size in box)


def row_blocks(box: Box, nbytes: int, limit: int) -> list[Box]:
    """The box, of `nbytes` bytes in all, in row-major order cut into boxes of `limit` bytes at most, if rows allow."""
    if nbytes <= limit:
        return [box]
    for dim, (first, size) in enumerate(box):
        if size > 1:
            step = max(1, size * limit // nbytes)
            parts = [
                (*box[:dim], (begin, min(step, first + size - begin)), *box[dim + 1 :])
                for begin in range(first, first + size, step)
            ]
            return [block for part in parts for block in row_blocks(part, nbytes * part[dim][1] // size, limit)]
    return [box]


def _lazy(tensor: torch.Tensor) -> LazyTensor:
    if isinstance(tensor, LazyTensor):
        return tensor
    return LazyTensor(tensor.shape, tensor.dtype, lambda box, out: out.copy_(tensor[slices(box)]) and None)


def _deferred(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of any operation: lazy tensors that compute all of it each time that a part is wanted."""

    def compute(device: torch.device | str) -> Any:
        def real(lazy: LazyTensor) -> torch.Tensor:
            out = torch.empty(lazy.shape, dtype=lazy.dtype, device=device)
            lazy.fetch(whole_box(lazy.shape), out)
            return out

        return func(*tree_map_only(LazyTensor, real, args), **tree_map_only(LazyTensor, real, kwargs))

    def shape_only(lazy: LazyTensor) -> torch.Tensor:
        return torch.empty(lazy.shape, dtype=lazy.dtype, device="meta")

    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "layout")}
    shapes = func(*tree_map_only(LazyTensor, shape_only, args), **tree_map_only(LazyTensor, shape_only, kwargs))
    many = isinstance(shapes, list | tuple)

    def fetch(number: int, box: Box, out: torch.Tensor) -> None:
        result = compute(out.device)
        out.copy_((result[number] if many else result)[slices(box)])

    lazies = [
        LazyTensor(shape.shape, shape.dtype, partial(fetch, number)) if isinstance(shape, torch.Tensor) else shape
        for number, shape in enumerate(shapes if many else [shapes])
    ]
    return type(shapes)(lazies) if many else lazies[0]


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> LazyTensor:
    lazies = [_lazy(tensor) for tensor in tensors]
    shape = list(lazies[0].shape)
    dim %= len(shape) + 1

    def fetch(box: Box, out: torch.Tensor) -> None:
        first, size = box[dim]
        for number in range(size):
            lazies[first + number].fetch(box[:dim] + box[dim + 1 :], out.select(dim, number))

    return LazyTensor([*shape[:dim], len(lazies), *shape[dim:]], lazies[0].dtype, fetch)


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> LazyTensor:
    lazies = [_lazy(tensor) for tensor in tensors]
    shape = list(lazies[0].shape)
    dim %= len(shape)
    shape[dim] = sum(lazy.shape[dim] for lazy in lazies)

    def fetch(box: Box, out: torch.Tensor) -> None:
        first, size = box[dim]
        begin = 0
        for lazy in lazies:
            end = begin + lazy.shape[dim]
            low, high = max(first, begin), min(first + size, end)
            if low < high:
                part = (*box[:dim], (low - begin, high - low), *box[dim + 1 :])
                lazy.fetch(part, out.narrow(dim, low - first, high - low))
            begin = end

    return LazyTensor(shape, lazies[0].dtype, fetch)


def _narrow(lazy: LazyTensor, dim: int, start: int, length: int) -> LazyTensor:
    def fetch(box: Box, out: torch.Tensor) -> None:
        lazy.fetch((*box[:dim], (box[dim][0] + start, box[dim][1]), *box[dim + 1 :]), out)

    return LazyTensor([*lazy.shape[:dim], length, *lazy.shape[dim + 1 :]], lazy.dtype, fetch)


def _slice(
    lazy: LazyTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> LazyTensor | None:
    if step != 1:
        return None
    dim %= lazy.dim()
    first, last, _ = slice(start, end).indices(lazy.shape[dim])
    return _narrow(lazy, dim, first, max(0, last - first))


def _split(lazy: LazyTensor, size: int, dim: int = 0) -> list[LazyTensor]:
    dim %= lazy.dim()
    whole = lazy.shape[dim]
    return [_narrow(lazy, dim, begin, min(size, whole - begin)) for begin in range(0, whole, size)]


def _split_with_sizes(lazy: LazyTensor, sizes: Sequence[int], dim: int = 0) -> list[LazyTensor]:
    dim %= lazy.dim()
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    return [_narrow(lazy, dim, begin, size) for begin, size in zip(begins, sizes, strict=True)]


def _select(lazy: LazyTensor, dim: int, index: int) -> LazyTensor:
    dim %= lazy.dim()
    index %= lazy.shape[dim]

    def fetch(box: Box, out: torch.Tensor) -> None:
        lazy.fetch((*box[:dim], (index, 1), *box[dim:]), out.unsqueeze(dim))

    return LazyTensor([*lazy.shape[:dim], *lazy.shape[dim + 1 :]], lazy.dtype, fetch)


def _unbind(lazy: LazyTensor, dim: int = 0) -> list[LazyTensor]:
    return [_select(lazy, dim, index) for index in range(lazy.shape[dim])]


def _squeeze(lazy: LazyTensor, dim: int) -> LazyTensor:
    return _select(lazy, dim, 0) if lazy.dim() and lazy.shape[dim] == 1 else lazy


def _unsqueeze(lazy: LazyTensor, dim: int) -> LazyTensor:
    return _stack([lazy], dim)


def _permute(lazy: LazyTensor, dims: Sequence[int]) -> LazyTensor:
    order = [dim % lazy.dim() for dim in dims]
    inverse = [order.index(dim) for dim in range(lazy.dim())]

    def fetch(box: Box, out: torch.Tensor) -> None:
        lazy.fetch(tuple(box[dim] for dim in inverse), out.permute(inverse))

    return LazyTensor([lazy.shape[dim] for dim in order], lazy.dtype, fetch)


def _transpose(lazy: LazyTensor, dim0: int, dim1: int) -> LazyTensor:
    order = list(range(lazy.dim()))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(lazy, order)


def _view(lazy: LazyTensor, size: Sequence[int]) -> LazyTensor:
    old = list(lazy.shape)
    new = list(torch.empty(old, device="meta").view(size).shape)
    left, right = 0, 0  # dimensions that stay, on either side of those that are joined or divided
    while left < min(len(old), len(new)) and old[left] == new[left]:
        left += 1
    while right < min(len(old), len(new)) - left and old[-1 - right] == new[-1 - right]:
        right += 1
    middle = whole_box(old[left : len(old) - right])

    def fetch(box: Box, out: torch.Tensor) -> None:
        if left and box[0][1] > 1:  # one after the other: the middle is fetched whole
            for number in range(box[0][1]):
                fetch(((box[0][0] + number, 1), *box[1:]), out.narrow(0, number, 1))
            return
        source = (*box[:left], *middle, *box[len(new) - right :])
        part = torch.empty(box_sizes(source), dtype=lazy.dtype, device=out.device)
        lazy.fetch(source, part)
        outer, inner = box_sizes(box[:left]), box_sizes(box[len(new) - right :])
        inside = (*whole_box(outer), *box[left : len(new) - right], *whole_box(inner))
        out.copy_(part.reshape([*outer, *new[left : len(new) - right], *inner])[slices(inside)])

    return LazyTensor(new, lazy.dtype, fetch)


def _same(lazy: LazyTensor, **_: Any) -> LazyTensor:
    return LazyTensor(lazy.shape, lazy.dtype, lazy.fetch)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _OPS.stack.default: _stack,
    _OPS.cat.default: _cat,
    _OPS.slice.Tensor: _slice,
    _OPS.split.Tensor: _split,
    _OPS.split_with_sizes.default: _split_with_sizes,
    _OPS.select.int: _select,
    _OPS.unbind.int: _unbind,
    _OPS.squeeze.dim: _squeeze,
    _OPS.unsqueeze.default: _unsqueeze,
    _OPS.permute.default: _permute,
    _OPS.transpose.int: _transpose,
    _OPS.t.default: lambda lazy: _transpose(lazy, 0, lazy.dim() - 1),
    _OPS.view.default: _view,
    _OPS._unsafe_view.default: _view,
    _OPS.alias.default: _same,
    _OPS.detach.default: _same,
    _OPS.clone.default: _same,
}
