"""What the attention layers of one decoder know of the packed row that goes through it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from veomni_parallel.errors import ParallelError
from veomni_parallel.packed_attention import sample_bounds
from veomni_parallel.ulysses import row_slices

ATTRIBUTE = "packed_place"
"""Name of the attribute by which an attention or linear-attention module finds its `Place`."""


@dataclass
class RowLink:
    """What the token-mixing modules of one decoder share."""

    decoder: nn.Module
    inner: str
    """Name of the attention implementation that the decoder was configured with."""
    group: Any = None
    """Process group of the ranks that share each row; None for one rank."""
    ranks: int = 1
    rank: int = 0
    silent: set[str] = field(default_factory=set)
    """Names of the modules that have not called the function that they are to call."""
    plain: bool = False
    """True inside `plain_attention`: every rank computes whole rows as the model was configured."""
    overlapping: bool = False
    """Whether the exchanges of this forward overlap with projections; so do those of its recomputation."""
    cu_seq_lens: torch.Tensor | None = None
    """Of the latest row that entered the decoder, where it was packed."""
    position_ids: torch.Tensor | None = None
    """Of the row on its way to the decoder, kept from a model around it that would build masks by them."""
    arguments: frozenset[str] = frozenset()
    """Names of the arguments of the decoder's latest forward; what else its attention is handed is a layer's own."""
    masks: dict[Any, Any] = field(default_factory=dict)
    """Masks of the latest row, for kernels that need one of the whole row."""
    _read: tuple[torch.Tensor, int, tuple[int, ...]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RowLink:
        """A copied model computes with the same ranks; a process group cannot be copied."""
        import copy

        copied = RowLink(copy.deepcopy(self.decoder, memo), self.inner, self.group, self.ranks, self.rank)
        copied.silent, copied.plain = set(self.silent), self.plain
        return copied

    def bounds(self, cu_seq_lens: torch.Tensor) -> tuple[int, ...]:
        """(0, ..., T) of a row; read from the device once for all layers."""
        known = self._read
        if known is None or known[0] is not cu_seq_lens or known[1] != cu_seq_lens._version:
            bounds = sample_bounds(cu_seq_lens)
            self._read = known = (cu_seq_lens, cu_seq_lens._version, bounds)
            self.masks = {}
        return known[2]

    def lengths(self, row: int) -> list[int] | None:
        """Tokens of each rank's slice of a row; None if they are equal."""
        return row_slices(row, self.ranks) if row % self.ranks else None

    def own(self, row: int) -> slice:
        """This rank's tokens of a row."""
        sizes = row_slices(row, self.ranks)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])


@dataclass
class Place:
    """A token-mixing module's own name beside what it shares with the others."""

    link: RowLink
    name: str
    overlap: Any = None
    """What is known of the module if its exchanges are to overlap, see `overlap_exchanges`."""

    def called(self) -> RowLink:
        """Note that the module took part; its link."""
        self.link.silent.discard(self.name)
        return self.link


def place_of(module: nn.Module) -> Place | None:
    """The module's place, None if it has none."""
    return getattr(module, ATTRIBUTE, None)


def links_of(model: nn.Module) -> list[RowLink]:
    """The links of all decoders inside a model."""
    places = [place for module in model.modules() if (place := place_of(module)) is not None]
    return list({id(place.link): place.link for place in places}.values())


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def tokens_of(kwargs: dict[str, Any]) -> tuple[str, torch.Tensor] | None:
    """The argument that holds a decoder's tokens: `inputs_embeds` or `input_ids`."""
    for name in ("inputs_embeds", "input_ids"):
        if isinstance(value := kwargs.get(name), torch.Tensor):
            return name, value
    return None


def find_cu_seq_lens(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Where the samples of the row [1, T] begin and end; None where there is one sample, or a batch of rows.

    Given as `cu_seq_lens_q`, or else read off `position_ids` [1, T] that restart, as transformers does where its masks
    are told of them.

    Raises:
        ParallelError: the row is packed but only M-RoPE positions could tell, or it is packed and has a cache.
    """
    found = tokens_of(kwargs)
    if found is None or found[1].shape[0] != 1:
        return None
    length = found[1].shape[1]
    given: torch.Tensor | None = kwargs.get("cu_seq_lens_q")
    positions: torch.Tensor | None = kwargs.get("position_ids")
    unmasked = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None
    if given is None and unmasked and positions is not None and positions.shape[-1] == length > 1:
        ids = positions.reshape(-1, length)
        if ids.shape[0] == 1:
            starts = (ids[0].diff() != 1).nonzero().flatten() + 1
            if len(starts):
                ends = starts.new_tensor([0, length])
                given = torch.cat([ends[:1], starts, ends[1:]]).to(torch.int32)
        elif bool(((ids[:, 1:] == 0).all(0) & (ids[:, :-1] > 0).any(0)).any()):
            raise ParallelError(
                "position_ids of three rows restart inside the row, so it is packed: give cu_seq_lens_q, which says"
                " where its samples begin and end."
            )
    if given is not None and kwargs.get("past_key_values") is not None:
        raise ParallelError("A packed row cannot be decoded with a cache: call the model with use_cache=False.")
    return given


def decoder_of(model: Any) -> nn.Module:
    """The decoder of a transformers model: `get_decoder()`, unless that is another module of this name (a head)."""
    decoder: Any = model.get_decoder()
    return decoder if hasattr(decoder, "config") else model.base_model
