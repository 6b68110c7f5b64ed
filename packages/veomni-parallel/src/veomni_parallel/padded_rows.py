"""Packed rows for decoders that cannot be told where samples begin: the row goes through them as a padded batch.

That holds for any decoder that honours a padding mask: alibi biases inside the attention (Bloom), state-space layers.
A recurrence (xLSTM) needs none, as padding comes last.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from veomni_parallel.errors import ParallelError
from veomni_parallel.packed_attention import sample_bounds
from veomni_parallel.packed_rows import find_cu_seq_lens, named_arguments, tokens_of

_OF_THE_ROW = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def pad_packed_rows(model: nn.Module, decoder: nn.Module) -> None:
    """Make the decoder of `model` compute the samples of a packed row [1, T] as a padded batch [n, L].

    What it returns is a row again. Rows of one sample and padded batches pass as they are. The price is the padding:
    n x L tokens instead of T, where L is the longest sample.
    """
    hook = _PaddedRow()
    if model is not decoder:  # which may keep `cu_seq_lens_q` and `position_ids` to itself
        model.register_forward_pre_hook(hook.note, with_kwargs=True)
    decoder.register_forward_pre_hook(hook.unpack, with_kwargs=True)
    decoder.register_forward_hook(hook.pack)


class _PaddedRow:
    def __init__(self) -> None:
        self.noted: torch.Tensor | None = None
        self.places: torch.Tensor | None = None
        self.shape = (0, 0)

    def note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember where samples begin."""
        self.noted = find_cu_seq_lens(named_arguments(model, args, kwargs))

    def unpack(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """[1, T] -> [n, L], as far as arguments are of the row."""
        kwargs = named_arguments(decoder, args, kwargs)
        noted, self.noted, self.places = self.noted, None, None
        cu_seq_lens, found = find_cu_seq_lens(kwargs), tokens_of(kwargs)
        cu_seq_lens = noted if cu_seq_lens is None else cu_seq_lens
        if cu_seq_lens is None or found is None:
            return (), kwargs
        bounds, length, device = sample_bounds(cu_seq_lens), found[1].shape[1], found[1].device
        if bounds[-1] != length:
            raise ParallelError(f"{found[0]} has {length} tokens, but cu_seq_lens_q ends at {bounds[-1]}.")
        for name in _OF_THE_ROW:
            kwargs.pop(name, None)
        if len(bounds) == 2:
            return (), kwargs
        lengths = torch.tensor([b - a for a, b in pairwise(bounds)], device=device)
        firsts = torch.tensor(bounds[:-1], device=device)
        offsets = torch.arange(int(lengths.max()), device=device)
        mask = offsets < lengths[:, None]  # [n, L]
        index = firsts[:, None] + offsets.minimum(lengths[:, None] - 1)
        positions = kwargs.get("position_ids")
        if positions is not None and positions.shape == (1, length):
            first = firsts.repeat_interleave(lengths)
            if torch.equal(positions[0], torch.arange(length, device=device) - first):
                del kwargs["position_ids"]  # the model's own; those of some begin at 2
        for name, value in kwargs.items():
            if not isinstance(value, torch.Tensor) or value.ndim < 2:
                continue
            if value.shape[:2] == (1, length):
                kwargs[name] = value[0][index]
            elif value.ndim == 3 and value.shape[1:] == (1, length):  # M-RoPE positions
                kwargs[name] = value[:, 0][:, index]
        if "attention_mask" in inspect.signature(decoder.forward).parameters:
            kwargs["attention_mask"] = mask.long()
        kwargs["use_cache"] = False
        self.places, self.shape = mask.flatten().nonzero().flatten(), tuple(mask.shape)
        return (), kwargs

    def pack(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        """[n, L, ...] -> [1, T, ...], for every tensor of the output."""
        if self.places is None:
            return output
        return self._pack(output)

    def _pack(self, value: Any) -> Any:
        n, longest = self.shape
        if isinstance(value, torch.Tensor):
            if value.shape[:2] == (n, longest):
                return value.flatten(0, 1)[self.places][None]
            if value.shape[:1] == (n * longest,):  # router logits
                return value[self.places]
            return value
        if isinstance(value, dict):  # a ModelOutput is one
            for name, inside in value.items():
                value[name] = self._pack(inside)
            return value
        if isinstance(value, tuple | list):
            return type(value)(self._pack(inside) for inside in value)
        return value
