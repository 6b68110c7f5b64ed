"""Answers with pictures in them: text that an omni model says, and what it draws where it begins a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veomni_models.decoders import tokens_of
from veomni_models.errors import ModelError
from veomni_models.last_states import last_states
from veomni_models.omni import OmniModel


@dataclass(frozen=True)
class DrawingOptions:
    """How pictures are drawn; `drawing_options` gives those that a model was built with.

    Attributes:
        guidance_scale: how far what the prompt adds is exaggerated (classifier-free guidance); 1 is not at all.
        temperature: of a discrete decoder's codes; 0 takes the likeliest.
        num_steps: of a continuous decoder, from noise to picture.
        seed: of the noise or the choice of codes.
    """

    guidance_scale: float = 3.0
    temperature: float = 1.0
    num_steps: int = 25
    seed: int = 0


def drawing_options(model: OmniModel, **options: Any) -> DrawingOptions:
    """What `model.decoders.image` says of how it draws, but for the `options` that are given."""
    said = model.config.decoders.get("image", {}).get("drawing", {})
    return DrawingOptions(**{**said, **{key: value for key, value in options.items() if value is not None}})


@dataclass
class Reply:
    """An answer.

    Attributes:
        parts: what was said and drawn, in order: lists of token ids, and pictures [3, S, S] in -1 .. 1.
    """

    parts: list[list[int] | Tensor] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """All that was said."""
        return [token for part in self.parts if isinstance(part, list) for token in part]

    @property
    def pictures(self) -> list[Tensor]:
        """All that was drawn."""
        return [part for part in self.parts if isinstance(part, Tensor)]


@torch.no_grad()
def reply(
    model: OmniModel,
    inputs: dict[str, Any],
    *,
    eos_token_id: int,
    pad_token_id: int,
    max_new_tokens: int = 64,
    unconditional_ids: Tensor | None = None,
    drawing: DrawingOptions | None = None,
    max_pictures: int = 4,
) -> list[Reply]:
    """Answer prompts greedily; where the model says that a picture begins, draw it and go on behind it.

    Args:
        model: not sharded, in evaluation mode.
        inputs: of the processor: `input_ids` and `attention_mask` [B, S], padded on the left, and media.
        eos_token_id, pad_token_id: of the tokenizer.
        max_new_tokens: where the text before, between or behind pictures is cut.
        unconditional_ids: int64 [S], a prompt without a wish, up to where a picture would begin; needed for guidance.
        drawing: how pictures are drawn; None: as the model's config says.
        max_pictures: of an answer; a further one is not drawn.

    Raises:
        ModelError: guidance without `unconditional_ids`.
    """
    drawing = drawing or drawing_options(model)
    start, end = model.config.image_gen_start_token_id, model.config.image_gen_end_token_id
    media = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    embeds = model.embed(inputs["input_ids"], **media)
    contexts = [row[mask.bool()] for row, mask in zip(embeds, inputs["attention_mask"], strict=True)]
    generator = torch.Generator().manual_seed(drawing.seed)
    replies = [Reply() for _ in contexts]
    going = list(range(len(contexts)))
    embed = model.get_input_embeddings()
    for drawn in range(max_pictures + 1):
        said = _say(model, [contexts[i] for i in going], eos_token_id, pad_token_id, max_new_tokens)
        asked = []
        for i, ids in zip(going, said, strict=True):
            if start in ids:
                ids = ids[: ids.index(start)]
                asked.append(i)
            replies[i].parts.append(ids)
            tokens = torch.tensor([*ids, start], device=embeds.device)
            contexts[i] = torch.cat([contexts[i], embed(tokens)])
        if not asked or drawn == max_pictures:
            break
        wishless = None if unconditional_ids is None else embed(unconditional_ids.to(embeds.device))
        pictures, tokens = draw(model, [contexts[i] for i in asked], wishless, drawing, generator)
        behind = embed(torch.tensor([end], device=embeds.device))
        for i, picture, states in zip(asked, pictures, tokens, strict=True):
            replies[i].parts.append(picture)
            contexts[i] = torch.cat([contexts[i], states, behind])
        going = asked
    return replies


@torch.no_grad()
def draw(
    model: OmniModel,
    contexts: Sequence[Tensor],
    unconditional: Tensor | None,
    drawing: DrawingOptions,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A picture for each context.

    Args:
        contexts: embeddings [S, H] up to the token with which a picture begins.
        unconditional: the same without a wish.

    Returns:
        Pictures [n, 3, Y, Y] in -1 .. 1, and the embeddings [n, L, H] that stand for them in what follows.

    Raises:
        ModelError: guidance without `unconditional`.
    """
    guided = drawing.guidance_scale != 1.0
    if guided and unconditional is None:
        raise ModelError("a guidance_scale other than 1 needs the ids of a prompt without a wish")
    decoder = model.decoders["image"]
    if hasattr(decoder, "codes"):
        return _draw_codes(model, contexts, unconditional if guided else None, drawing, generator)
    queries = decoder.queries
    # not in one batch with the contexts: padding would make its condition depend on theirs
    without = _states_at(model, [unconditional], queries) if guided and unconditional is not None else None
    pictures = decoder.sample(
        _states_at(model, contexts, queries),
        without,
        guidance_scale=drawing.guidance_scale,
        num_steps=drawing.num_steps,
        generator=generator,
    )
    return pictures, queries.expand(len(contexts), -1, -1)


def _states_at(model: OmniModel, contexts: Sequence[Tensor], queries: Tensor) -> Tensor:
    """The foundation's states [n, L, H] at queries behind the contexts."""
    embeds, mask = _padded([torch.cat([context, queries.to(context.dtype)]) for context in contexts])
    with last_states(model) as states:
        model.foundation(inputs_embeds=embeds, attention_mask=mask, position_ids=_positions(mask), use_cache=False)
    return states[0][:, -len(queries) :]


def _draw_codes(
    model: OmniModel,
    contexts: Sequence[Tensor],
    unconditional: Tensor | None,
    drawing: DrawingOptions,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Codes one after the other; with guidance each is chosen by unconditional + s (conditional - unconditional)."""
    decoder, embed = model.decoders["image"], model.get_input_embeddings()
    n, first = len(contexts), model.config.first_code_id
    rows = [*contexts, *([unconditional] * n if unconditional is not None else [])]
    embeds, mask = _padded(rows)
    positions, cache, codes = _positions(mask), None, []
    for _ in range(tokens_of(decoder)):
        out = model.foundation(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        logits = out.logits[:, -1, first : first + decoder.num_codes].float().cpu()
        if unconditional is not None:
            with_wish, without = logits.chunk(2)
            logits = without + drawing.guidance_scale * (with_wish - without)
        if drawing.temperature > 0:
            shares = (logits / drawing.temperature).softmax(-1)
            chosen = torch.multinomial(shares, 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        codes.append(chosen.to(embeds.device))
        embeds = embed(codes[-1].repeat(len(rows) // n) + first)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    made = torch.stack(codes, dim=1)
    return decoder.pictures(made), embed(made + first)


def _say(model: OmniModel, contexts: Sequence[Tensor], eos: int, pad: int, most: int) -> list[list[int]]:
    """What the model says behind each context: up to the end, or with the token by which a picture begins."""
    config = model.config
    codes = range(config.first_code_id, config.text_config.vocab_size) if config.first_code_id is not None else ()
    never = [token for token in (config.image_gen_token_id, *codes) if token is not None]
    stops = [eos] if config.image_gen_start_token_id is None else [eos, config.image_gen_start_token_id]
    embeds, mask = _padded(contexts)
    made = model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=pad,
        suppress_tokens=never or None,
    )
    said = []
    for ids in made.tolist():
        ends = [ids.index(stop) for stop in stops if stop in ids]
        last = min(ends, default=len(ids) - 1)
        said.append(ids[:last] if ends and ids[last] == eos else ids[: last + 1])
    return said


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings [B, S, H] padded on the left, and their mask [B, S]."""
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.int64, device=embeds.device)
    for i, row in enumerate(rows):
        embeds[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return embeds, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)
