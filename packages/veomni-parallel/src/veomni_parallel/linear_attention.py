"""Linear attention (gated delta rule) and short convolutions over packed rows, sliced over Ulysses ranks or not.

Such a layer mixes tokens twice: by a causal convolution over a few of them, and by a recurrence over all before. Both
begin anew at each sample. The convolution takes the last columns of the slice before (halo) and zeros between samples;
the recurrence runs over the whole row of some heads, like softmax attention under Ulysses, each sample on its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from veomni_parallel.all_to_all import all_to_all
from veomni_parallel.errors import ParallelError
from veomni_parallel.packed_attention import MaskRule, stack_pieces
from veomni_parallel.packed_rows import ATTRIBUTE, Place, RowLink
from veomni_parallel.ulysses import heads_to_sequence, key_head_repeats, row_slices, sequence_to_heads

_CONVOLUTION = "causal_conv1d_fn"
_DELTA_RULE = re.compile(r"(torch_)?chunk_gated_delta_rule")
_CLASSES = ("GatedDeltaNet", "ShortConv")


def linear_attention_modules(decoder: nn.Module) -> dict[str, nn.Module]:
    """The modules whose tokens mix by a causal convolution and, if at all, by a gated delta rule, by name.

    Recognised by the functions that their forward calls: those of transformers' modeling files (Qwen3-Next, Qwen3.5,
    OLMo Hybrid, LFM2, ...).
    """
    found = {}
    for name, module in decoder.named_modules():
        if type(module).__name__.endswith(_CLASSES) and _CONVOLUTION in (names := _globals_called(module)):
            rule = any(_DELTA_RULE.fullmatch(called) for called in names)
            if rule or type(module).__name__.endswith("ShortConv"):
                found[name] = module
    return found


def divide_linear_attention(decoder: nn.Module, link: RowLink) -> None:
    """Make every module of `linear_attention_modules` keep samples apart, over the ranks of the link.

    A module's own forward stays what it is, but finds other functions under the names of the convolution and the delta
    rule: on this module only, the modeling file is not changed.

    Raises:
        ParallelError: the ranks do not divide a module's value heads.
    """
    for name, module in linear_attention_modules(decoder).items():
        heads = getattr(module, "num_v_heads", None)
        if heads is not None and heads % link.ranks:
            raise ParallelError(
                f"{heads} value heads (linear_num_value_heads of {type(module).__name__}) cannot be divided over"
                f" ulysses={link.ranks} ranks."
            )
        place = Place(link, name)
        setattr(module, ATTRIBUTE, place)
        link.silent.add(name)
        forward = inspect.unwrap(type(module).forward)
        others: dict[str, Any] = {}
        for called in _globals_called(module):
            if called == _CONVOLUTION:
                others[called] = _convolution(forward.__globals__[called], place)
            elif _DELTA_RULE.fullmatch(called):
                others[called] = _delta_rule(forward.__globals__[called], place)
        rebound = FunctionType(
            forward.__code__,
            {**forward.__globals__, **others},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        rebound.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(rebound, module)


def _globals_called(module: nn.Module) -> tuple[str, ...]:
    forward = inspect.unwrap(type(module).forward)
    return tuple(name for name in forward.__code__.co_names if name in forward.__globals__)


def _convolution(original: Callable[..., Any], place: Place) -> Callable[..., Any]:
    def causal_conv1d_fn(hidden_states: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[1, C, S] -> [1, C, S]; weight [C, K]."""
        link = place.called()
        cu_seq_lens = kwargs.pop("cu_seq_lens_q", None)
        cu_seq_lens = link.cu_seq_lens if cu_seq_lens is None else cu_seq_lens
        if cu_seq_lens is None or link.plain:
            return original(hidden_states, weight, *args, **kwargs)
        bounds, reach = link.bounds(cu_seq_lens), weight.shape[-1] - 1
        own, device = link.own(bounds[-1]), hidden_states.device
        if hidden_states.shape[-1] != own.stop - own.start:
            raise ParallelError(
                f"{place.name} was handed {hidden_states.shape[-1]} tokens instead of this rank's"
                f" {own.stop - own.start}: call the model with use_cache=False."
            )
        first = torch.tensor(bounds[:-1], device=device)
        token = torch.arange(own.start, own.stop, device=device)
        # samples that begin in this slice are set `reach` columns apart, and so is the slice from its halo
        number = torch.searchsorted(torch.tensor(bounds[1:], device=device), token, right=True)
        places = token - own.start + reach * (1 + number - number[0])
        room = hidden_states.new_zeros(*hidden_states.shape[:2], int(places[-1]) + 1)
        row = room.index_copy(2, places, hidden_states)
        if link.ranks > 1:
            halo = exchange_halo(hidden_states, reach, bounds[-1], link)  # [1, C, <= reach]
            before = torch.arange(own.start - halo.shape[2], own.start, device=device)
            halo = halo * (before >= first[number[0]]).to(halo.dtype)
            row = row.index_add(2, torch.arange(reach - halo.shape[2], reach, device=device), halo)
        return original(row, weight, *args, **kwargs)[:, :, places]

    return causal_conv1d_fn


def exchange_halo(x: torch.Tensor, reach: int, row: int, link: RowLink) -> torch.Tensor:
    """The columns of a sliced row just before this rank's slice.

    Args:
        x: [1, C, S_own].
        reach: columns that are wanted.
        row: tokens of the whole row.
        link: of the ranks.

    Returns:
        [1, C, n], n <= reach: fewer where the row begins.
    """
    ends = [0]
    for size in row_slices(row, link.ranks):
        ends.append(ends[-1] + size)

    def columns(source: int, target: int) -> slice:
        """Of the source's own, those that the target lacks."""
        start, stop = ends[source], ends[source + 1]
        return slice(max(start, ends[target] - reach) - start, max(0, min(stop, ends[target]) - start))

    channels = x.shape[1]
    # also who sends nothing is part of the graph: it sends gradients back
    parts = [x[:, :, columns(link.rank, t) if t > link.rank else slice(0, 0)] for t in range(link.ranks)]
    receive = [
        channels * max(0, (c := columns(source, link.rank)).stop - c.start) if source < link.rank else 0
        for source in range(link.ranks)
    ]
    sent = torch.cat([part.reshape(-1) for part in parts])
    got = all_to_all(sent, [part.numel() for part in parts], receive, link.group)
    return torch.cat([block.view(1, channels, -1) for block in got.split(receive)], dim=2)


def _delta_rule(original: Callable[..., Any], place: Place) -> Callable[..., Any]:
    def chunk_gated_delta_rule(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *args: Any,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query, key: [1, S, Hk, D]; value: [1, S, Hv, Dv]; g, beta: [1, S, Hv] -> [1, S, Hv, Dv]."""
        link = place.called()
        cu_seqlens = link.cu_seq_lens if cu_seqlens is None else cu_seqlens
        if cu_seqlens is None or link.plain:
            return original(query, key, value, *args, g=g, beta=beta, **kwargs)
        bounds = link.bounds(cu_seqlens)
        lengths = link.lengths(bounds[-1])
        if link.ranks > 1:
            if (repeats := key_head_repeats(query.shape[2], link.ranks)) > 1:
                query, key = query.repeat_interleave(repeats, dim=2), key.repeat_interleave(repeats, dim=2)

            def exchange(x: torch.Tensor) -> torch.Tensor:
                """[1, S_own, H, D] -> [1, S, H/P, D]."""
                return sequence_to_heads(x.transpose(1, 2), link.group, lengths).transpose(1, 2)

            query, key = exchange(torch.cat([query, key], dim=-1)).chunk(2, dim=-1)
            gates = exchange(torch.stack([g.float(), beta.float()], dim=-1))
            value, g, beta = exchange(value), gates[..., 0].to(g.dtype), gates[..., 1].to(beta.dtype)

        if takes_cu_seqlens(original):
            out = original(query, key, value, *args, g=g, beta=beta, cu_seqlens=cu_seqlens, **kwargs)[0]
        else:
            stacks, places = stack_pieces(bounds, MaskRule(), query.device)
            computed = []
            for stack in stacks:
                # [1, T, H, D] -> [n, L, H, D]; a sample's padding lies behind its end and changes nothing before
                pieces = [x[0][stack.queries].unflatten(0, (stack.n, -1)) for x in (query, key, value, g, beta)]
                computed.append(original(*pieces[:3], *args, g=pieces[3], beta=pieces[4], **kwargs)[0].flatten(0, 1))
            row = torch.cat(computed)
            out = (row if places is None else row[places])[None]
        if link.ranks > 1:
            out = heads_to_sequence(out.transpose(1, 2), link.group, lengths).transpose(1, 2)
        return out, None

    return chunk_gated_delta_rule


def takes_cu_seqlens(function: Callable[..., Any]) -> bool:
    """Whether a kernel keeps samples apart itself: transformers' fallbacks in plain torch refuse to."""
    while hasattr(function, "__wrapped__"):
        closure = inspect.getclosurevars(function).nonlocals
        if "is_new_implementation" in closure:
            return bool(closure["is_new_implementation"])
        function = function.__wrapped__
    return "cu_seqlens" in inspect.signature(function).parameters
