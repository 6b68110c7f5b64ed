"""Keep the activations of forward in host memory until backward needs them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

GIGABYTE = 1e9

_WEIGHT_VIEWS = {
    "TBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "SelectBackward0",
    "ToCopyBackward0",
    "_ToTorchTensorBackward",
    "_ScaleGradientBackward",
    "_SumBackwardBackward",
}
"""Operations between a parameter and what a matrix product saves of it."""


@dataclass
class OffloadReport:
    """What happened inside an `activation_offload`, in bytes."""

    kept: int = 0
    """On the device at this moment, of what could have been moved."""
    moved: int = 0
    """Copied to host memory in all."""


@contextmanager
def activation_offload(
    limit_gb: float = 0.0, *, min_bytes: int = 1 << 20, ahead: int = 2, from_cpu: bool = False
) -> Iterator[OffloadReport]:
    """Around forward and backward: what autograd saves goes to host memory, beyond `limit_gb` that stay on the device.

    Copies run on streams of their own beside the computation: out while forward goes on, and back for the next `ahead`
    tensors while backward computes. Parameters, small tensors and what lies in host memory already stay. Combine it
    with `activation_checkpointing` and only the inputs of blocks are moved. Numbers do not change.

    Args:
        limit_gb: gigabytes (1e9 bytes) of activations that stay on the device; the first ones of each forward, which
            backward needs last, are kept.
        min_bytes: tensors below stay.
        ahead: how many tensors are fetched before they are asked for.
        from_cpu: copy tensors of the CPU, too, to rehearse on a machine without an accelerator.

    Yields:
        Counts of bytes, which go on counting until backward is done.
    """
    store = _Store(int(limit_gb * GIGABYTE), min_bytes, ahead, from_cpu)
    with torch.autograd.graph.saved_tensors_hooks(store.pack, store.unpack):
        yield store.report


class _Kept:
    """A tensor that stays; the limit has room again when autograd lets go of it."""

    def __init__(self, tensor: torch.Tensor, report: OffloadReport) -> None:
        self.tensor = tensor
        weakref.finalize(self, _release, report, tensor.nbytes)


class _Moved:
    """A tensor in host memory, and what is under way of it back to its device."""

    def __init__(
        self, host: torch.Tensor, device: torch.device, arrived: Any, before: list[weakref.ref[_Moved]]
    ) -> None:
        self.host, self.device, self.arrived, self.before = host, device, arrived, before
        self.fetched: torch.Tensor | None = None
        self.ready: Any = None


@dataclass
class _Store:
    """The two hooks, and what they share."""

    limit: int
    min_bytes: int
    ahead: int
    from_cpu: bool
    report: OffloadReport = field(default_factory=OffloadReport)
    latest: list[weakref.ref[_Moved]] = field(default_factory=list)
    streams: dict[torch.device, tuple[Any, Any]] = field(default_factory=dict)

    def pack(self, tensor: torch.Tensor) -> Any:
        stays = tensor.device.type in ("cpu", "meta") and not self.from_cpu
        if stays or tensor.nbytes < self.min_bytes or type(tensor) is not torch.Tensor or _is_weight(tensor):
            return tensor
        if self.report.kept + tensor.nbytes <= self.limit:
            self.report.kept += tensor.nbytes
            return _Kept(tensor, self.report)
        self.report.moved += tensor.nbytes
        moved = self._move_out(tensor.detach())
        self.latest = [*self.latest, weakref.ref(moved)][-self.ahead :] if self.ahead else []
        return moved

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _Kept):
            return packed.tensor
        if not isinstance(packed, _Moved):
            return packed
        self._fetch(packed)
        for reference in reversed(packed.before):
            if (earlier := reference()) is not None:
                self._fetch(earlier)
        tensor, packed.fetched = packed.fetched, None
        assert tensor is not None
        if packed.ready is not None:
            now = torch.accelerator.current_stream(packed.device)
            now.wait_event(packed.ready)
            tensor.record_stream(now)
        return tensor

    def _move_out(self, tensor: torch.Tensor) -> _Moved:
        if tensor.device.type == "cpu":
            return _Moved(tensor.clone(), tensor.device, None, self.latest)
        out, _ = self._streams_of(tensor.device)
        out.wait_stream(torch.accelerator.current_stream(tensor.device))
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with out:
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(out)  # its memory is not reused before the copy is done
        return _Moved(host, tensor.device, out.record_event(), self.latest)

    def _fetch(self, moved: _Moved) -> None:
        if moved.fetched is not None:
            return
        if moved.device.type == "cpu":
            moved.fetched = moved.host
            return
        _, back = self._streams_of(moved.device)
        back.wait_event(moved.arrived)
        with back:
            moved.fetched = moved.host.to(moved.device, non_blocking=True)
        moved.ready = back.record_event()

    def _streams_of(self, device: torch.device) -> tuple[Any, Any]:
        if device not in self.streams:
            self.streams[device] = (torch.Stream(device), torch.Stream(device))
        return self.streams[device]


def _release(report: OffloadReport, size: int) -> None:
    report.kept -= size


def _is_weight(tensor: torch.Tensor) -> bool:
    """Whether a saved tensor is a parameter or a view of one, whose memory stays (or is FSDP's to free) anyway."""
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return True
    node = tensor.grad_fn
    while node is not None and node.name() in _WEIGHT_VIEWS:
        node = node.next_functions[0][0]
    accumulates = node is not None and node.name().endswith("AccumulateGrad")
    return accumulates or (tensor.is_leaf and tensor.requires_grad)
