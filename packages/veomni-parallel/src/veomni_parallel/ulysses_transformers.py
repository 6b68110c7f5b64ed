"""Ulysses for transformers models, through the public registries of attention and mask functions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from veomni_parallel.errors import ParallelError
from veomni_parallel.mesh import Mesh
from veomni_parallel.ulysses import ulysses_attention

NAME = "ulysses"
"""Name of the attention implementation in transformers' registries."""

_SLICEABLE_LAYERS = {"full_attention", "sliding_attention"}


@dataclass
class _Link:
    """What the attention modules of one decoder share; each has it as its attribute `ulysses`."""

    group: Any
    ranks: int
    rank: int
    decoder: nn.Module
    inner: str
    """Name of the attention implementation that runs on the whole row."""
    silent: dict[int, str]
    """id and name of the attention modules that have not called the registered function yet."""
    masks: dict[Any, Any] = field(default_factory=dict)
    """Masks of the latest row, by window and dtype."""
    masks_of: torch.Tensor | None = None


class _LocalHeads:
    """An attention module as seen by the inner function when the ratio of its heads changed by repetition."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self.module, self.num_key_value_groups = module, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def apply_ulysses(model: nn.Module, mesh: Mesh) -> None:
    """Switch the decoder of a transformers model to attention over rows that are sliced over `mesh`.

    `model.get_decoder()` gets a registered attention function; the implementation it was configured with (sdpa, eager,
    flash, or one registered by the user) runs inside, on the whole row of some heads. Towers beside the decoder keep
    theirs. Call this before wrapping.

    A forward then takes, by keyword, `cu_seq_lens_q` of the whole row and `position_ids` that restart for each sample.
    Its tokens are either this rank's slice already, or (multimodal models) still the whole row when they reach the
    decoder: then `inputs_embeds` and `position_ids` are sliced there, and labels are expected sliced.

    Raises:
        ParallelError: the ranks do not divide the attention heads, a layer mixes tokens in another way than by full or
            sliding causal attention, or the model's attention cannot be exchanged.
        RuntimeError: at the end of the first forward, if an attention module did not call the registered function.
    """
    ranks = mesh.size()
    if ranks == 1:
        return
    decoder = model.get_decoder()
    config, title = decoder.config, type(decoder).__name__
    attention = _attention_modules(decoder)
    if config.num_attention_heads % ranks:
        raise ParallelError(
            f"{config.num_attention_heads} attention heads (num_attention_heads of {title}) cannot be divided over"
            f" ulysses={ranks} ranks."
        )
    if reason := _unsliceable(decoder, attention):
        raise ParallelError(f"Ulysses cannot slice the rows of {title}: {reason}; use ulysses=1.")

    inner = config._attn_implementation
    _register()
    link = _Link(
        group=mesh.get_group(),
        ranks=ranks,
        rank=mesh.get_local_rank(),
        decoder=decoder,
        inner=inner,
        silent={id(module): name for name, module in attention.items()},
    )
    decoder.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise ParallelError(
            f"Ulysses cannot slice the rows of {title}: its attention does not go through transformers'"
            " AttentionInterface; use ulysses=1."
        )
    for module in attention.values():
        module.ulysses = link
    decoder.register_forward_pre_hook(_slice_row, with_kwargs=True)
    handle: list[Any] = []
    handle.append(model.register_forward_hook(lambda module, args, output: _guard(link, handle)))


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Inside, a model under Ulysses computes every row by itself, on each rank: for generation and evaluation."""
    links = {id(link): link for m in model.modules() if isinstance(link := getattr(m, "ulysses", None), _Link)}
    for link in links.values():
        link.decoder.set_attn_implementation(link.inner)
    try:
        yield
    finally:
        for link in links.values():
            link.decoder.set_attn_implementation(NAME)


def _attention_modules(decoder: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that are attention by the name of their class."""

    def is_attention(module: nn.Module) -> bool:
        return "Attention" in type(module).__name__

    return {
        name: module
        for name, module in decoder.named_modules()
        if is_attention(module) and not any(is_attention(inner) for inner in module.modules() if inner is not module)
    }


def _unsliceable(decoder: nn.Module, attention: dict[str, nn.Module]) -> str | None:
    """Why the rows of a decoder cannot be sliced, as far as its structure tells; None if nothing speaks against it."""
    if not attention:
        return "it has no attention module"
    if getattr(decoder.config, "is_encoder_decoder", False):
        return "it attends to an encoder"
    if unknown := sorted(set(getattr(decoder.config, "layer_types", None) or ()) - _SLICEABLE_LAYERS):
        return f"it has layers of type {', '.join(unknown)}"
    if free := [name for name, module in attention.items() if not getattr(module, "is_causal", True)]:
        return f"{free[0]} is not causal"
    for name, layers in decoder.named_children():
        if isinstance(layers, nn.ModuleList):
            without = [i for i in range(len(layers)) if not any(a.startswith(f"{name}.{i}.") for a in attention)]
            if 0 < len(without) < len(layers):
                return f"{name}.{without[0]} has no attention module, unlike other layers"
    return None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _link_of(decoder: nn.Module) -> _Link:
    return next(link for m in decoder.modules() if isinstance(link := getattr(m, "ulysses", None), _Link))


def _guard(link: _Link, handle: list[Any]) -> None:
    if link.decoder.config._attn_implementation != NAME:
        return
    if link.silent:
        names = list(link.silent.values())
        raise RuntimeError(
            f"Rows are sliced over {link.ranks} Ulysses ranks, but {len(names)} attention modules of"
            f" {type(link.decoder).__name__} did not call the registered attention function in the first step"
            f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): they would attend to their slice only. Use"
            " ulysses=1."
        )
    handle[0].remove()


def _slice_row(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the decoder: check what arrives, and take this rank's slice of what is still whole."""
    link = _link_of(decoder)
    if decoder.config._attn_implementation != NAME:
        return args, kwargs
    kwargs = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
    ends, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if ends is None or position_ids is None:
        missing = "cu_seq_lens_q" if ends is None else "position_ids"
        raise ParallelError(
            f"Sequence parallelism needs {missing}: call the model with packed rows (cu_seq_lens_q of the whole row and"
            " position_ids that restart for each sample)."
        )
    if kwargs.get("attention_mask") is not None:
        raise ParallelError("Sequence parallelism takes its mask from cu_seq_lens_q; attention_mask must be None.")
    tokens = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
    length, whole = kwargs[tokens].shape[1], int(ends[-1])
    if length * link.ranks == whole:
        return (), kwargs
    if length != whole:
        raise ParallelError(
            f"{tokens} has {length} tokens, but cu_seq_lens_q ends at {whole}: under ulysses={link.ranks} it must be"
            f" the whole row ({whole}) or this rank's slice of it ({whole / link.ranks:g})."
        )
    if whole % link.ranks:
        raise ParallelError(
            f"A row of {whole} tokens cannot be sliced over ulysses={link.ranks} ranks: pad it to a multiple."
        )
    part = whole // link.ranks
    own = slice(link.rank * part, (link.rank + 1) * part)
    kwargs[tokens] = kwargs[tokens][:, own]
    if position_ids.shape[-1] == whole:
        kwargs["position_ids"] = position_ids[..., own]
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim > 1 and whole in value.shape[1:]:
            raise ParallelError(
                f"{type(decoder).__name__} was handed {name} of the whole row, which Ulysses cannot slice."
            )
    return (), kwargs


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """What the model sees of a slice makes no mask; `_attention` builds it from the whole row."""
    return


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of the registry. query: [B, H, S/P, D], key, value: [B, Hkv, S/P, D] -> [B, S/P, H, Dv]."""
    link: _Link = module.ulysses
    link.silent.pop(id(module), None)
    kwargs.pop("position_ids", None)  # this slice's: an inner function must not take them for the row's

    def attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        changed = getattr(module, "num_key_value_groups", groups) != groups
        seen = _LocalHeads(module, groups) if changed else module
        out, _ = _inner_function(module, link.inner)(seen, q, k, v, _mask(link, module, q, kwargs), **kwargs)
        return out.transpose(1, 2)  # [B, S, H/P, Dv] -> [B, H/P, S, Dv]

    return ulysses_attention(query, key, value, link.group, attn).transpose(1, 2), None


def _inner_function(module: nn.Module, name: str) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # every modeling file has its own eager function, which is not in the registry
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _mask(link: _Link, module: nn.Module, q: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """The block-causal mask of the whole row in the inner implementation's own form; None if it needs none."""
    from transformers import masking_utils

    build = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(link.inner)
    if build is None:
        return None
    ends, window, length = kwargs["cu_seq_lens_q"], kwargs.get("sliding_window"), q.shape[2]
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types and layer_types[module.layer_idx] == "sliding_attention" and window is None:
        raise ParallelError(
            f"{type(module).__name__} does not tell its attention function the sliding window; use ulysses=1."
        )
    if link.masks_of is not ends:
        link.masks_of, link.masks = ends, {}
    if (window, q.dtype) not in link.masks:
        segments = torch.searchsorted(ends[1:], torch.arange(length, device=q.device, dtype=ends.dtype), right=True)[
            None
        ]
        causal = (
            masking_utils.sliding_window_causal_mask_function(window) if window else masking_utils.causal_mask_function
        )
        link.masks[window, q.dtype] = build(
            batch_size=1,
            q_length=length,
            kv_length=length,
            mask_function=masking_utils.and_masks(masking_utils.packed_sequence_mask_function(segments), causal),
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=q.dtype,
            device=q.device,
            config=module.config,
        )
    return link.masks[window, q.dtype]
