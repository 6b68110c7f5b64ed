"""Packed rows and Ulysses for transformers models, through the public registries of attention and mask functions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from veomni_parallel.errors import ParallelError
from veomni_parallel.linear_attention import divide_linear_attention, linear_attention_modules
from veomni_parallel.mesh import Mesh
from veomni_parallel.overlapped_attention import overlap_exchanges, require_overlap
from veomni_parallel.packed_rows import (
    ATTRIBUTE,
    Place,
    RowLink,
    decoder_of,
    find_cu_seq_lens,
    links_of,
    named_arguments,
    place_of,
    tokens_of,
)
from veomni_parallel.packed_transformers import inner_implementation, register_packed_attention
from veomni_parallel.padded_rows import pad_packed_rows
from veomni_parallel.shared_sequence import share_sequence

_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layer types of transformers' configs whose mask is known from the config."""


def apply_packed_attention(model: nn.Module) -> None:
    """Keep the samples of packed rows apart in a transformers model, also where its own masks would not.

    `model.get_decoder()` gets a registered attention function that takes from `cu_seq_lens_q` (or from `position_ids`
    that restart) and from the layer's window or chunk what a token sees; the implementation that the model was
    configured with computes it. Linear-attention layers begin anew at each sample. A decoder that cannot be told (its
    attention does not go through transformers' interface, or its layers mix tokens in other ways) computes the samples
    of a row as a padded batch, and one that takes no padding mask either (CPM-Ant) refuses packed rows. Padded batches,
    generation and models with an encoder are as before. Call this before wrapping; `build_parallelize_model` and
    `apply_ulysses` do it.
    """
    decoder = decoder_of(model)
    config = getattr(decoder, "config", None)
    if config is None or links_of(decoder) or getattr(config, "is_encoder_decoder", False):
        return
    attention = _attention_modules(decoder)
    if _unsliceable(decoder, attention) or not all(_calls_interface(module) for module in attention.values()):
        taken = set(inspect.signature(decoder.forward).parameters)
        if {"attention_mask", "input_ids"} <= taken or ("input_ids" in taken and not attention):
            pad_packed_rows(model, decoder)
        else:
            model.register_forward_pre_hook(_refuse_packed, with_kwargs=True)  # which may not tell its decoder
        return
    link = RowLink(decoder, inner_implementation(decoder.config))
    _attach(model, link, attention)


def apply_ulysses(model: nn.Module, mesh: Mesh, *, overlap: bool = False) -> None:
    """Switch the decoder of a transformers model to attention over rows that are sliced over `mesh`.

    `model.get_decoder()` gets a registered attention function; the implementation it was configured with (sdpa, eager,
    flash, or one registered by the user) runs inside, on the whole row of some heads. What a token sees is taken from
    `cu_seq_lens_q` and the layer's window or chunk. Linear-attention layers take the end of the slice before and
    exchange heads. Towers beside the decoder keep their attention. A model with an attribute
    `shared_sequence` gets a `SharedSequence` there. Call this before wrapping.

    A forward then takes, by keyword, `cu_seq_lens_q` of the whole row and `position_ids` that restart for each sample.
    Its tokens are either this rank's slice already (`torch.tensor_split` of the row), or (multimodal models) still the
    whole row when they reach the decoder: then all that is of the row is sliced there, and labels are expected sliced.

    A model to which this was applied is left as it is: `build_parallelize_model` may follow.

    Args:
        model: a transformers model.
        mesh: the ranks that share each row.
        overlap: let the exchange of some heads be under way while the next are projected; from the second forward on.

    Raises:
        ParallelError: the ranks do not divide the attention heads, a layer mixes tokens in another way than by causal
            (full, sliding, chunked) or linear attention, the model's attention cannot be exchanged, or `overlap` is
            asked of attention that has no projections of the common form.
        RuntimeError: at the end of the first forward, if an attention module did not call the registered function.
    """
    ranks = mesh.size()
    if ranks == 1:
        return
    decoder = decoder_of(model)
    if any(link.ranks == ranks for link in links_of(decoder)):
        return
    config, title = decoder.config, type(decoder).__name__
    attention = _attention_modules(decoder)
    heads = getattr(config, "num_attention_heads", None)
    if attention and isinstance(heads, int) and heads % ranks:
        raise ParallelError(
            f"{heads} attention heads (num_attention_heads of {title}) cannot be divided over ulysses={ranks} ranks."
        )
    if reason := _unsliceable(decoder, attention):
        raise ParallelError(f"Ulysses cannot slice the rows of {title}: {reason}; use ulysses=1.")
    link = RowLink(decoder, inner_implementation(config), mesh.get_group(), ranks, mesh.get_local_rank())
    _attach(model, link, attention)
    share_sequence(model, mesh)
    if overlap:
        overlap_exchanges(attention)


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Inside, a model under Ulysses computes every row by itself, on each rank: for generation and evaluation."""
    links = links_of(model)
    names = {id(link): link.decoder.config._attn_implementation for link in links}
    for link in links:
        link.decoder.set_attn_implementation(link.inner)
        link.plain = True
    try:
        yield
    finally:
        for link in links:
            link.decoder.set_attn_implementation(names[id(link)])
            link.plain = False


def _attention_modules(decoder: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that are attention by the name of their class."""

    def is_attention(module: nn.Module) -> bool:
        return "Attention" in type(module).__name__

    return {
        name: module
        for name, module in decoder.named_modules()
        if is_attention(module) and not any(is_attention(inner) for inner in module.modules() if inner is not module)
    }


def _calls_interface(module: nn.Module) -> bool:
    """Whether the forward of an attention module looks its attention function up in transformers' registry."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _unsliceable(decoder: nn.Module, attention: dict[str, nn.Module]) -> str | None:
    """Why rows of a decoder cannot be taken apart, as far as its structure tells; None if nothing speaks against it."""
    linear = linear_attention_modules(decoder)
    if not attention and not linear:
        return "it has no attention module"
    if getattr(decoder.config, "is_encoder_decoder", False):
        return "it attends to an encoder"
    known = _LAYERS | ({"linear_attention", "conv"} if linear else set())
    if unknown := sorted(set(getattr(decoder.config, "layer_types", None) or ()) - known):
        return f"it has layers of type {', '.join(unknown)}"
    if free := [name for name, module in attention.items() if not getattr(module, "is_causal", True)]:
        return f"{free[0]} is not causal"
    if _insists_on_masks(decoder):
        return "it selects what tokens see in a mask of the whole row"
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in decoder.modules()):
        return "it counts positions by its tokens, not from 0"
    mixers = [*attention, *linear]
    for name, layers in decoder.named_children():
        if isinstance(layers, nn.ModuleList):
            without = [i for i in range(len(layers)) if not any(m.startswith(f"{name}.{i}.") for m in mixers)]
            if 0 < len(without) < len(layers):
                return f"{name}.{without[0]} has no attention module, unlike other layers"
    return None


def _insists_on_masks(decoder: nn.Module) -> bool:
    """Whether the modeling file asks for a mask even where a causal kernel needs none, because layers change it."""
    try:
        return "allow_is_causal_skip" in inspect.getsource(sys.modules[type(decoder).__module__])
    except OSError:  # typed into an interpreter
        return False


def _attach(model: nn.Module, link: RowLink, attention: dict[str, nn.Module]) -> None:
    """Register the attention function, give all modules their place, and watch what goes through the decoder."""
    decoder: Any = link.decoder
    divided = link.ranks > 1
    name = register_packed_attention(link.inner)
    if attention:
        decoder.set_attn_implementation(name)
        if decoder.config._attn_implementation != name:
            if divided:
                raise ParallelError(
                    f"Ulysses cannot slice the rows of {type(decoder).__name__}: its attention does not go through"
                    " transformers' AttentionInterface; use ulysses=1."
                )
            pad_packed_rows(model, decoder)
            return
    for module_name, module in attention.items():
        setattr(module, ATTRIBUTE, Place(link, module_name))
        link.silent.add(module_name)
    divide_linear_attention(decoder, link)
    for module in _mask_builders(model, decoder):
        module.register_forward_pre_hook(partial(_keep_positions, link), with_kwargs=True)
    decoder.register_forward_pre_hook(_enter_sliced if divided else _enter_whole, with_kwargs=True)
    if divided:
        model.register_forward_pre_hook(_require_shifted_labels, with_kwargs=True)
    handle: list[Any] = []
    handle.append(model.register_forward_hook(lambda module, args, output: _guard(link, handle)))


def _mask_builders(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """Models around the decoder that build its masks themselves (Gemma 3: a picture's tokens see each other)."""
    around = [module for module in model.modules() if module is not decoder and decoder in module.modules()]

    def builds(module: nn.Module) -> bool:
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        return code is not None and any("create_" in name and "mask" in name for name in code.co_names)

    return [module for module in around if builds(module)]


def _keep_positions(
    link: RowLink, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hand `position_ids` of a packed row to the decoder past the model that builds its masks.

    With them, transformers looks up the blocks that see themselves by places in the sample instead of the row. Without
    them the mask is right for each sample, and what it shows of other samples is taken away by `cu_seq_lens_q`.
    """
    kwargs = named_arguments(model, args, kwargs)
    if link.plain or kwargs.get("position_ids") is None or find_cu_seq_lens(kwargs) is None:
        return None
    link.position_ids = kwargs.pop("position_ids")
    return (), kwargs


def _take_positions(link: RowLink, kwargs: dict[str, Any]) -> None:
    if link.position_ids is not None:
        kwargs["position_ids"], link.position_ids = link.position_ids, None


def _require_shifted_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    plain = all(link.plain for link in links_of(model))
    if not plain and kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        raise ParallelError(
            "Under sequence parallelism labels cannot be shifted inside a slice: give shift_labels (the target of each"
            " position, sliced like the tokens) besides labels."
        )


def _refuse_packed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if find_cu_seq_lens(named_arguments(model, args, kwargs)) is not None:
        raise ParallelError(
            f"The row is packed, but {type(model).__name__} takes neither the places where samples begin nor a padding"
            " mask: they would see each other. Give one sample a row."
        )


def _guard(link: RowLink, handle: list[Any]) -> None:
    """After the first packed forward: every module must have called the function that keeps samples apart."""
    if link.plain or link.cu_seq_lens is None:
        return
    if link.silent:
        names = sorted(link.silent)
        title = type(link.decoder).__name__
        did_not = (
            f"{len(names)} attention modules of {title} did not call the registered attention function in the first"
            f" step ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        )
        if link.ranks == 1:
            raise RuntimeError(
                f"The row is packed, but {did_not}: they would attend to other samples too. Use padded rows."
            )
        raise RuntimeError(
            f"Rows are sliced over {link.ranks} Ulysses ranks, but {did_not}: they would attend to their slice only."
            " Use ulysses=1."
        )
    handle[0].remove()


def _arriving(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[RowLink, dict[str, Any] | None]:
    """What a decoder is handed, by name; None where it computes every row by itself."""
    link = links_of(decoder)[0]
    link.cu_seq_lens = None
    if link.plain:
        return link, None
    named = named_arguments(decoder, args, kwargs)
    _take_positions(link, named)
    link.arguments = frozenset(named)
    return link, named


def _enter_whole(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a decoder that is handed whole rows: find out where samples begin."""
    link, named = _arriving(decoder, args, kwargs)
    if named is None:
        return args, kwargs
    link.cu_seq_lens = cu_seq_lens = find_cu_seq_lens(named)
    if cu_seq_lens is not None and (found := tokens_of(named)) is not None:
        if (end := link.bounds(cu_seq_lens)[-1]) != found[1].shape[1]:
            raise ParallelError(f"{found[0]} has {found[1].shape[1]} tokens, but cu_seq_lens_q ends at {end}.")
        named["use_cache"] = False
    return (), named


def _enter_sliced(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a decoder under Ulysses: check what arrives, take this rank's slice of what is whole."""
    link, named = _arriving(decoder, args, kwargs)
    if named is None:
        return args, kwargs
    kwargs = named
    found, cu_seq_lens, position_ids = tokens_of(kwargs), kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if cu_seq_lens is None or position_ids is None:
        missing = "cu_seq_lens_q" if cu_seq_lens is None else "position_ids"
        raise ParallelError(
            f"Sequence parallelism needs {missing}: call the model with packed rows (cu_seq_lens_q of the whole row and"
            " position_ids that restart for each sample)."
        )
    if kwargs.get("past_key_values") is not None:
        raise ParallelError("A packed row cannot be decoded with a cache: call the model with use_cache=False.")
    if found is None or found[1].shape[0] != 1:
        raise ParallelError(
            "Sequence parallelism takes one packed row [1, T] at a time, as input_ids or inputs_embeds."
        )
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim < 4:
        raise ParallelError("Sequence parallelism takes its mask from cu_seq_lens_q; attention_mask must be None.")
    kwargs["use_cache"] = False
    link.cu_seq_lens = cu_seq_lens
    # decided before the forward: what backward computes again must take the same way
    overlaps = [place.overlap for m in decoder.modules() if (place := place_of(m)) is not None and place.overlap]
    link.overlapping = bool(overlaps) and all(decoder.training in overlap.arguments for overlap in overlaps)
    require_overlap(overlaps)
    name, tokens = found
    length, whole = tokens.shape[1], link.bounds(cu_seq_lens)[-1]
    own = link.own(whole)
    part = own.stop - own.start
    if length == part:
        return (), kwargs
    if length != whole:
        raise ParallelError(
            f"{name} has {length} tokens, but cu_seq_lens_q ends at {whole}: under ulysses={link.ranks} it must be"
            f" the whole row ({whole}) or this rank's slice of it ({part})."
        )
    if whole < link.ranks:
        raise ParallelError(f"A row of {whole} tokens cannot be sliced over ulysses={link.ranks} ranks: pad it.")
    _slice_deepstack(kwargs, own)
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim > 1 and key != "attention_mask":
            if value.shape[:2] == (1, whole):
                kwargs[key] = value[:, own]
            elif key == "position_ids" and value.shape[-1] == whole:  # M-RoPE: [3, 1, T]
                kwargs[key] = value[..., own]
            elif whole in value.shape[1:]:
                raise ParallelError(
                    f"{type(decoder).__name__} was handed {key} of the whole row, which Ulysses cannot slice."
                )
    return (), kwargs


def _slice_deepstack(kwargs: dict[str, Any], own: slice) -> None:
    """Features that are added to some tokens in early layers (DeepStack): those of this slice's tokens."""
    mask, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if mask is None or features is None:
        return
    before, here = int(mask[:, : own.start].sum()), int(mask[:, own].sum())
    kwargs["deepstack_visual_embeds"] = type(features)(value[before : before + here] for value in features)
