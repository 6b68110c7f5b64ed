"""The attention function that transformers models call for packed rows, sliced over Ulysses ranks or not.

It is registered with transformers under a name for each inner implementation ("packed_sdpa", ...). What a token sees is
taken from `cu_seq_lens_q` and the layer's window or chunk, never from a mask that the model built: several modeling
files build theirs without position ids, and samples of a packed row then see each other.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from veomni_parallel.errors import ParallelError
from veomni_parallel.packed_attention import MaskRule, chunk_bounds, packed_attention, softmax_kernel
from veomni_parallel.packed_rows import RowLink, place_of
from veomni_parallel.ulysses import ulysses_attention

_STACKED = ("sdpa", "eager")
"""Inner implementations that compute pieces of a row; all others are given the whole row and `cu_seq_lens_q`."""
_OF_THE_ROW = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def register_packed_attention(inner: str) -> str:
    """Make the attention around the implementation `inner` known to transformers; returns its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface

    # a name with "flash" in it would make modeling files prepare what only a flash kernel itself needs
    name = "packed_" + inner.replace("flash", "varlen")
    AttentionInterface.register(name, partial(_attention, inner))
    AttentionMaskInterface.register(name, partial(_mask, inner))
    return name


def inner_implementation(config: Any) -> str:
    """The attention implementation that a config asks for; the inner one if a model that shares it was here before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name: str = config._attn_implementation
    registered = inspect.unwrap(ALL_ATTENTION_FUNCTIONS.get(name) or len)  # compiled models register it wrapped
    ours = isinstance(registered, partial) and registered.func is _attention
    return registered.args[0] if ours else name


def _mask(
    inner: str,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Any:
    """No mask where a row sees only what lies before it, otherwise the inner implementation's own."""
    from transformers import masking_utils

    if attention_mask is None and batch_size == 1 and q_length == kv_length:
        causal = mask_function is masking_utils.causal_mask_function
        if causal or not _looks_ahead(mask_function, q_length, device):
            return None
    build = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(inner)
    if build is None:
        return None
    return build(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )


def _looks_ahead(mask_function: Callable[..., Any], length: int, device: torch.device | str) -> bool:
    """Whether some token sees its successor (a picture whose patches see each other): no mask rule says that."""
    q = torch.arange(length - 1, device=device)
    zero = torch.zeros_like(q)
    seen = mask_function(zero, zero, q, q + 1)
    return bool(seen.any() if isinstance(seen, torch.Tensor) else seen)


def _attention(
    inner: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' registry.

    query: [B, H, S, D]; key: [B, Hkv, S, D]; value: [B, Hkv, S, Dv] of this rank's tokens -> [B, S, H, Dv].
    """
    place = place_of(module)
    link = place.called() if place is not None else RowLink(module, inner)
    cu_seq_lens = kwargs.get("cu_seq_lens_q")
    if cu_seq_lens is None:
        cu_seq_lens = link.cu_seq_lens
    if cu_seq_lens is None or query.shape[0] > 1:
        whole = attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
        if not whole:
            return inner_function(module, inner)(module, query, key, value, attention_mask, **kwargs)[0], None
        bounds: tuple[int, ...] = (0, query.shape[2])
    else:
        bounds = link.bounds(cu_seq_lens)
    kwargs.pop("position_ids", None)  # of this slice: an inner function must not take them for the row's
    query = restart_temperature(module, query, bounds, link.own(bounds[-1]).start)
    if link.ranks > 1:
        _refuse_unsliceable(link, module, query, kwargs)
        if place is not None and place.overlap is not None:
            place.overlap.record(module, _of_the_layer(link, kwargs))

    def attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return row_attention(link, module, q, k, v, attention_mask, bounds, kwargs).transpose(1, 2)

    out = ulysses_attention(query, key, value, link.group, attn, lengths=link.lengths(bounds[-1]))
    return out.transpose(1, 2).contiguous(), None  # some models take views of it


def row_attention(
    link: RowLink,
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    bounds: tuple[int, ...],
    kwargs: dict[str, Any],
    first_head: int | None = None,
) -> torch.Tensor:
    """Attention of some heads over a whole row by the inner implementation.

    Args:
        link: of the decoder.
        module: the attention module.
        q, k, v: [1, h, T, D], [1, h', T, D] and [1, h', T, Dv]: this rank's heads of the row.
        mask: what the model built; None unless tokens see later ones.
        bounds: where samples begin and end.
        kwargs: what the model handed to its attention function.
        first_head: the first of `q` among the module's; None: rank x h.

    Returns:
        [1, T, h, Dv].
    """
    rule = mask_rule(module, kwargs)
    sinks, groups = kwargs.get("s_aux"), q.shape[1] // k.shape[1]
    own_sinks = sinks
    if sinks is not None and len(sinks) != q.shape[1]:
        first = link.rank * q.shape[1] if first_head is None else first_head
        own_sinks = sinks[first : first + q.shape[1]]
        kwargs = {**kwargs, "s_aux": own_sinks}
    changed = own_sinks is not sinks or getattr(module, "num_key_value_groups", groups) != groups
    seen = _LocalHeads(module, groups, sinks, own_sinks) if changed else module
    function = inner_function(module, link.inner)

    if mask is not None:
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_THE_ROW}
        return function(seen, q, k, v, _within_samples(link, mask, bounds), **kwargs)[0]
    own = _of_the_layer(link, kwargs)
    by_row = any(isinstance(value, torch.Tensor) and value.ndim > 1 for value in own.values())
    if link.inner in _STACKED and not by_row:
        kwargs = own
        softcap, dropout = kwargs.get("softcap"), kwargs.get("dropout", 0.0)
        if link.inner == "sdpa" and (softcap is not None or own_sinks is not None):
            kernel = softmax_kernel(kwargs.get("scaling"), softcap, own_sinks, dropout)
        else:

            def kernel(sq: torch.Tensor, sk: torch.Tensor, sv: torch.Tensor, piece: torch.Tensor | None) -> Any:
                return function(seen, sq, sk, sv, _piece_mask(link.inner, piece, sq), **kwargs)[0]

        return packed_attention(q, k, v, bounds, rule, kernel)

    # whole rows: chunks are samples of their own, the window is an argument of its own
    bounds = chunk_bounds(bounds, rule.chunk)
    if rule.window is not None or "sliding_window" in kwargs:
        kwargs = {**kwargs, "sliding_window": rule.window}
    if rule.chunk is not None or kwargs.get("cu_seq_lens_q") is None:
        ends = torch.tensor(bounds, dtype=torch.int32, device=q.device)
        longest = int(ends.diff().max())
        kwargs = {**kwargs, **dict(zip(_OF_THE_ROW, (ends, ends, longest, longest), strict=True))}
    return function(seen, q, k, v, _row_mask(link, module, q, bounds, rule), **kwargs)[0]


def mask_rule(module: nn.Module, kwargs: dict[str, Any]) -> MaskRule:
    """What a token of a layer sees, from the layer's type in the model's config and its attention's window.

    Raises:
        ParallelError: a layer of sliding attention whose window neither its arguments nor the config tell.
    """
    config, window = getattr(module, "config", None), kwargs.get("sliding_window")
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = types[index] if types and index is not None and index < len(types) else None
    if kind == "chunked_attention":
        return MaskRule(chunk=config.attention_chunk_size)  # type: ignore[union-attr]
    if kind == "sliding_attention":
        window = getattr(config, "sliding_window", None) if window is None else window
        if window is None:
            raise ParallelError(
                f"{type(module).__name__} of layer {index} slides, but neither its arguments nor its config tell the"
                " sliding_window."
            )
    elif kind is not None:
        window = None
    return MaskRule(window=window)


def inner_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function of that name, as `module` would call it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # every modeling file has its own eager function, which is not in the registry
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def restart_temperature(module: nn.Module, query: torch.Tensor, bounds: tuple[int, ...], start: int) -> torch.Tensor:
    """Llama 4 scales queries of layers without rotary embedding by their place, counted from the first token it sees.

    In a packed row, or a slice of it, that is not the sample's first token: undo the factor and apply the right one
    (log1p(floor((place + 1) / floor_scale)) * attn_scale + 1, https://arxiv.org/abs/2501.19399).
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    floor, scale = module.floor_scale, module.attn_scale

    def factor(places: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((places.float() + 1.0) / floor)) * scale + 1.0

    own = torch.arange(query.shape[2], device=query.device)
    firsts = torch.tensor(bounds[:-1], device=query.device)
    ends = torch.tensor(bounds[1:], device=query.device)
    in_sample = start + own - firsts[torch.searchsorted(ends, start + own, right=True)]
    return (query * (factor(in_sample) / factor(own))[:, None]).to(query.dtype)


class _LocalHeads:
    """An attention module as seen by the inner function when it computes some of its heads only."""

    def __init__(self, module: nn.Module, groups: int, sinks: Any, own_sinks: Any) -> None:
        self.module, self.num_key_value_groups = module, groups
        self._sinks, self._own_sinks = sinks, own_sinks

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return self._own_sinks if value is self._sinks and value is not None else value


def _refuse_unsliceable(link: RowLink, module: nn.Module, query: torch.Tensor, kwargs: dict[str, Any]) -> None:
    for name, value in _of_the_layer(link, kwargs).items():
        if name != "s_aux" and isinstance(value, torch.Tensor) and {query.shape[1], query.shape[2]} & set(value.shape):
            raise ParallelError(
                f"{type(module).__name__} hands {name} of shape {list(value.shape)} to its attention function, which"
                " Ulysses cannot divide over the heads of ranks; use ulysses=1."
            )


def _of_the_layer(link: RowLink, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a layer itself hands to its attention function, without tensors of the batch that pass through."""
    return {
        name: value
        for name, value in kwargs.items()
        if name not in _OF_THE_ROW and not (name in link.arguments and isinstance(value, torch.Tensor))
    }


def _piece_mask(inner: str, mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """The mask of a stack [L, K] in the form that the inner implementation takes."""
    if inner == "sdpa":
        return None if mask is None else mask[None, None]
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    lowest = torch.finfo(q.dtype).min
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, lowest)[None, None]


def _samples(link: RowLink, bounds: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[1, T], the number of each token's sample."""
    key = ("samples", bounds)
    if key not in link.masks:
        link.masks = {}  # of other rows
        ends = torch.tensor(bounds[1:], device=device)
        link.masks[key] = torch.searchsorted(ends, torch.arange(bounds[-1], device=device), right=True)[None]
    return link.masks[key]


def _row_mask(link: RowLink, module: nn.Module, q: torch.Tensor, bounds: tuple[int, ...], rule: MaskRule) -> Any:
    """The mask of the whole row in the inner implementation's own form; None if it needs none."""
    from transformers import masking_utils

    build = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(link.inner)
    if build is None:
        return None
    key = ("row", bounds, rule, q.dtype)
    if key not in link.masks:
        causal = masking_utils.causal_mask_function
        if rule.window is not None:
            causal = masking_utils.sliding_window_causal_mask_function(rule.window)
        samples = masking_utils.packed_sequence_mask_function(_samples(link, bounds, q.device))
        link.masks[key] = build(
            batch_size=1,
            q_length=bounds[-1],
            kv_length=bounds[-1],
            mask_function=masking_utils.and_masks(samples, causal),
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=q.dtype,
            device=q.device,
            config=module.config,
        )
    return link.masks[key]


def _within_samples(link: RowLink, mask: Any, bounds: tuple[int, ...]) -> Any:
    """A mask that the model built for the whole row, without what it shows of other samples."""
    if isinstance(mask, torch.Tensor):
        if mask.shape[-1] != bounds[-1] or mask.shape[-2] != bounds[-1]:
            raise ParallelError(
                f"The attention mask of shape {list(mask.shape)} is not one of the whole row of {bounds[-1]} tokens."
            )
        samples = _samples(link, bounds, mask.device)
        apart = samples[:, :, None] != samples[:, None, :]
        return mask.masked_fill(apart, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    samples = _samples(link, bounds, mask.kv_num_blocks.device)[0]
    same = and_masks(mask.mask_mod, lambda b, h, q, kv: samples[q] == samples[kv])
    return create_block_mask(same, B=1, H=None, Q_LEN=bounds[-1], KV_LEN=bounds[-1], device=samples.device)
