"""Ulysses with exchanges under way while the next heads are projected: the same numbers, less waiting.

Attention modules of the common form (q_proj, k_proj, v_proj, o_proj, rotary embedding) are computed here head group by
head group: values and keys travel while queries are projected, one group of queries travels while the next is
projected, and the result of one group travels while the next attends. In backward they overlap in reverse.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from veomni_parallel.errors import ParallelError
from veomni_parallel.packed_rows import Place, named_arguments, place_of
from veomni_parallel.packed_transformers import row_attention
from veomni_parallel.ulysses import (
    begin_heads_to_sequence,
    begin_sequence_to_heads,
    count_ulysses_call,
    key_head_repeats,
)

_GROUPS = 2
"""Groups of query heads; more make each exchange, and what it hides behind, smaller."""


@dataclass
class Overlap:
    """What is known of an attention module whose exchanges are to overlap."""

    arguments: dict[bool, dict[str, Any]] = field(default_factory=dict)
    """What the module hands to its attention function, in evaluation and in training; tensors by attribute name."""
    checked: bool = False
    refused: str | None = None
    """Why the module keeps its own forward, found when it was checked."""

    def record(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        """Remember what the module's own forward handed to its attention function."""
        if module.training not in self.arguments:
            own = {id(parameter): name for name, parameter in module.named_parameters()}
            self.arguments[module.training] = {
                name: _Attribute(own[id(value)]) if id(value) in own else value for name, value in kwargs.items()
            }


@dataclass(frozen=True)
class _Attribute:
    name: str


def can_overlap(module: nn.Module) -> bool:
    """Whether an attention module has the common form: four projections, a rotary embedding, norms within heads."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or not {"apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"} <= set(code.co_names):
        return False
    projections = [getattr(module, f"{name}_proj", None) for name in "qkvo"]
    head, config = getattr(module, "head_dim", None), getattr(module, "config", None)
    if head is None or not all(isinstance(projection, nn.Linear) for projection in projections):
        return False
    q, k, v, o = (projection.weight.shape for projection in projections if projection is not None)
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    return (
        q[0] == o[1] == getattr(config, "num_attention_heads", 0) * head
        and k == v
        and all(norm is None or norm.weight.numel() == head for norm in norms)
        and {"hidden_states", "position_embeddings"} <= set(inspect.signature(module.forward).parameters)
    )


def overlap_exchanges(attention: dict[str, nn.Module]) -> None:
    """Let the exchanges of all attention modules of the common form overlap with their projections.

    The first forward in training and in evaluation runs as before: it shows what a module hands to its attention
    function, and whether computing it by head groups gives the same; a module that it does not keeps its own forward.

    Raises:
        ParallelError: no module has that form; at the second forward, if none could be computed by head groups.
    """
    fit = [module for module in attention.values() if can_overlap(module)]
    if not fit:
        title = type(next(iter(attention.values()))).__name__
        raise ParallelError(
            f"overlap=True projects heads in groups, which needs q_proj, k_proj, v_proj, o_proj and a rotary embedding;"
            f" {title} is of another form: use overlap=False."
        )
    for module in fit:
        place = place_of(module)
        if place is not None:
            place.overlap = Overlap()
            module.forward = _overlapped(module, place)


def _overlapped(module: nn.Module, place: Place) -> Callable[..., Any]:
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        link, overlap = place.link, place.overlap
        if link.overlapping and not link.plain and overlap.refused is None:
            return _attend(module, place, **named_arguments(module, args, kwargs)), None
        output = original(*args, **kwargs)
        if not link.plain and not overlap.checked and module.training in overlap.arguments:
            overlap.checked = True
            _check(module, place, output[0], named_arguments(module, args, kwargs))
        return output

    return forward


@torch.no_grad()
def _check(module: nn.Module, place: Place, expected: torch.Tensor, arguments: dict[str, Any]) -> None:
    if place.overlap.arguments[module.training].get("dropout", 0.0) > 0:
        place.overlap.refused = "dropout of attention weights differs from one computation to the next"
        return
    apart = (_attend(module, place, **arguments) - expected).abs().max().float()
    same = apart <= 1000 * torch.finfo(expected.dtype).eps * expected.abs().max()
    differs = (~same).float()
    dist.all_reduce(differs, group=place.link.group)  # all ranks must go the same way
    if differs > 0:
        place.overlap.refused = "computing it by head groups gives other numbers"


def require_overlap(overlaps: list[Overlap]) -> None:
    """Refuse to go on as if exchanges overlapped where no module could.

    Raises:
        ParallelError: then, with the reason of the first.
    """
    if overlaps and all(overlap.refused is not None for overlap in overlaps):
        raise ParallelError(f"overlap=True is possible in no layer ({overlaps[0].refused}): use overlap=False.")


def _attend(
    module: Any,
    place: Place,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """[1, S_own, C] -> [1, S_own, C], as the module's own forward."""
    count_ulysses_call()
    link = place.called()
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    cu_seq_lens = link.cu_seq_lens if cu_seq_lens is None else cu_seq_lens
    bounds = link.bounds(cu_seq_lens)
    lengths, group = link.lengths(bounds[-1]), link.group
    handed = {
        name: getattr(module, value.name) if isinstance(value, _Attribute) else value
        for name, value in place.overlap.arguments[module.training].items()
    } | {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
    handed |= {name: kwargs[name] for name in ("max_length_q", "max_length_k") if name in kwargs}
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    head = module.head_dim

    def split(x: torch.Tensor, norm: Any = None) -> torch.Tensor:
        """[1, S, h * D] -> [1, h, S, D]."""
        x = x.unflatten(-1, (-1, head))
        return (x if norm is None else norm(x)).transpose(1, 2)

    value, key = split(module.v_proj(hidden_states)), None
    repeats = key_head_repeats(value.shape[1], link.ranks)

    def begin(x: torch.Tensor, repeats: int = 1) -> Callable[[], torch.Tensor]:
        return begin_sequence_to_heads(x.repeat_interleave(repeats, dim=1) if repeats > 1 else x, group, lengths)

    values = begin(value, repeats)
    key = split(module.k_proj(hidden_states), getattr(module, "k_norm", None))
    keys = begin(rotate(key[:, :0], key, *position_embeddings)[1], repeats)

    heads = module.q_proj.out_features // head // link.ranks  # of a rank
    parts = _head_parts(module.q_proj, heads, value.shape[1] * repeats // link.ranks)
    queries = []
    for part in parts:
        query = split(_project(module.q_proj, hidden_states, part, head, link.ranks), getattr(module, "q_norm", None))
        queries.append(begin(rotate(query, query[:, :0], *position_embeddings)[0]))
    k, v = keys(), values()
    outs = []
    for part, ready in zip(parts, queries, strict=True):
        ratio = heads // k.shape[1]
        seen = slice(part.start // ratio, -(-part.stop // ratio))
        out = row_attention(
            link,
            module,
            ready(),
            k[:, seen],
            v[:, seen],
            attention_mask,
            bounds,
            handed,
            first_head=link.rank * heads + part.start,
        )
        outs.append(begin_heads_to_sequence(out.transpose(1, 2), group, lengths))
    # [1, P * part, S, D] each -> [1, P, heads, S, D], the order of heads that o_proj expects
    joined = torch.cat([out().unflatten(1, (link.ranks, -1)) for out in outs], dim=2).flatten(1, 2)
    return module.o_proj(joined.transpose(1, 2).flatten(2))


def _head_parts(q_proj: nn.Linear, heads: int, key_heads: int) -> list[slice]:
    """Groups of a rank's query heads, such that each group has key heads of its own or shares one."""
    size, ratio = heads // _GROUPS, heads // key_heads
    whole = type(q_proj) is not nn.Linear or q_proj._forward_hooks or q_proj._forward_pre_hooks
    if whole or heads % _GROUPS or (size % ratio and ratio % size):
        return [slice(0, heads)]
    return [slice(start, start + size) for start in range(0, heads, size)]


def _project(q_proj: nn.Linear, x: torch.Tensor, part: slice, head: int, ranks: int) -> torch.Tensor:
    """[1, S, C] -> [1, S, P * part * D]: the queries of some heads of every rank."""
    heads = q_proj.out_features // head // ranks
    if part == slice(0, heads):
        return q_proj(x)
    weight = q_proj.weight.unflatten(0, (ranks, heads, head))[:, part].flatten(0, 2)
    bias = None if q_proj.bias is None else q_proj.bias.unflatten(0, (ranks, heads, head))[:, part].flatten()
    return F.linear(x, weight, bias)
