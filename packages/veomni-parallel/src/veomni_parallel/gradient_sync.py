"""Accumulate gradients over micro-batches without reducing each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch: reduce gradients over ranks now, or leave them for later.

    Give `enabled=False` for all micro-batches of a step but the last. Works for whatever `build_parallelize_model`
    returned, and does nothing for a model of one process. Until the last, FSDP keeps whole gradients in memory.
    """
    if enabled:
        yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    elif isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        with model.no_sync():
            yield
    else:
        yield
