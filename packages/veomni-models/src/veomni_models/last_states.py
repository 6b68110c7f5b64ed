"""The states that a language model's head is given, caught on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def last_states(model: Any, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Inside, each run of `model.get_decoder()` leaves its last hidden states, [B, S, H], in the list, if `wanted`."""
    states: list[Tensor] = []
    if not wanted:
        yield states
        return

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = model.get_decoder().register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()
