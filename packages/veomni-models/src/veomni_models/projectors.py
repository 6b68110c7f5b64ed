"""From an encoder's features to the foundation model's embeddings: projectors by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veomni_models.errors import ModelError


class LinearProjector(nn.Linear):
    """One linear layer: features [N, C] to [N, H]."""

    def forward(self, features: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Map [N, C] to [N, H]."""
        return super().forward(features)


class PixelShuffleProjector(nn.Linear):
    """One linear layer without bias over neighbouring patches that were merged (2 x 2 unless `merge_size` says more).

    Formula: https://arxiv.org/abs/2408.12637, section 3 (Idefics3).
    """

    merge_size = 2

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__(input_size, output_size, bias=False)

    def forward(self, features: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Map [N, C] to [N, H]."""
        return super().forward(features)


class MLPProjector(nn.Module):
    """Normalises features and maps them by two linear layers with GELU between: [N, C] to [N, H].

    Args:
        input_size: channels C of the features, after merging.
        output_size: hidden size H of the foundation model.
    """

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(input_size)
        self.up = nn.Linear(input_size, output_size)
        self.down = nn.Linear(output_size, output_size)

    def forward(self, features: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Map [N, C] to [N, H]."""
        return self.down(F.gelu(self.up(self.norm(features))))


class PerceiverProjector(nn.Module):
    """A fixed number of learnt queries that attend to the features of each picture, frame or sound.

    Formula: the Perceiver Resampler of https://arxiv.org/abs/2204.14198, appendix A.1.1.

    Args:
        input_size: channels C of the features.
        output_size: hidden size H of the foundation model.
        num_tokens: queries Q, the tokens of each picture, frame or sound.
        num_layers: of attention and feed-forward.
        num_heads: of attention; a divisor of H.
    """

    def __init__(
        self, input_size: int, output_size: int, num_tokens: int = 64, num_layers: int = 2, num_heads: int = 8
    ) -> None:
        super().__init__()
        if output_size % num_heads:
            raise ModelError(
                f"projector perceiver: num_heads={num_heads} does not divide the foundation's {output_size}"
            )
        self.queries = nn.Parameter(torch.empty(num_tokens, output_size))
        self.norm, self.up = nn.LayerNorm(input_size), nn.Linear(input_size, output_size)
        self.layers = nn.ModuleList(_PerceiverLayer(output_size, num_heads) for _ in range(num_layers))
        self.reset_parameters()

    @staticmethod
    def tokens(length: int, num_tokens: int = 64, **options: Any) -> int:
        """As many as there are queries."""
        return num_tokens

    def reset_parameters(self) -> None:
        """Draw the queries."""
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5)

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        """Map [N, C], `lengths` of n items that sum to N, to [n * Q, H]."""
        context = self.up(self.norm(features))
        context = nn.utils.rnn.pad_sequence(list(context.split(list(lengths))), batch_first=True)  # [n, P, H]
        ends = torch.tensor(list(lengths), device=features.device)[:, None]
        seen = torch.arange(context.shape[1], device=features.device) < ends  # [n, P]
        seen = F.pad(seen, (0, len(self.queries)), value=True)[:, None, None]  # queries see each other too
        latents = self.queries.expand(len(context), -1, -1)  # [n, Q, H]
        for layer in self.layers:
            latents = layer(latents, context, seen)
        return latents.flatten(0, 1)


class _PerceiverLayer(nn.Module):
    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_context, self.norm_latents, self.norm = (nn.LayerNorm(size) for _ in range(3))
        self.query, self.output = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.key_value = nn.Linear(size, 2 * size, bias=False)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, latents: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        """latents [n, Q, H], context [n, P, H], seen [n, 1, 1, P + Q] -> [n, Q, H]."""
        x = self.norm_latents(latents)
        keys = self.key_value(torch.cat([self.norm_context(context), x], dim=1))
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.query(x), *keys.chunk(2, -1)))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        latents = latents + self.output(attended)
        return latents + self.down(F.gelu(self.up(self.norm(latents))))


_PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "perceiver": PerceiverProjector,
}


def register_projector(name: str, projector_class: type[nn.Module]) -> None:
    """Make a projector of one's own known under a name that `model.encoders.*.projector` may say.

    Args:
        name: for YAML files.
        projector_class: an `nn.Module`, made as `projector_class(input_size, output_size, **options)`. Its forward is
            given the features [N, C] of all pictures, frames or sounds of a row, one after the other, and `lengths`,
            how many each has; it returns embeddings [M, H] in the same order. A class that makes of them more or fewer
            has a static method `tokens(length, **options)`, by which a processor counts those of one picture, frame or
            sound. Parameters of its own, outside of modules of torch, are drawn in its `reset_parameters()`.

    Raises:
        ModelError: the name is another class's.
    """
    known = _PROJECTORS.setdefault(name, projector_class)
    if known is not projector_class:
        raise ModelError(f"projector {name!r} is {known.__name__} already: register yours under another name")


def projector_class(name: str) -> Any:
    """The class of a name; ModelError if there is none."""
    if name not in _PROJECTORS:
        raise ModelError(f"projector {name!r} is unknown: use one of {sorted(_PROJECTORS)}, or register_projector")
    return _PROJECTORS[name]


def projector_keys(keys: str | Mapping[str, Any]) -> dict[str, Any]:
    """`mlp` or `{type: perceiver, num_tokens: 16}` of a YAML file as a dict that has `type`; ModelError if it is none.

    The options are checked against what the class takes.
    """
    plain = {"type": keys} if isinstance(keys, str) else dict(keys)
    if "type" not in plain:
        raise ModelError(f"projector {plain} has no type: write for example {{type: perceiver, num_tokens: 16}}")
    taken = list(inspect.signature(projector_class(plain["type"])).parameters)[2:]
    for option in plain.keys() - {"type"}:
        if option not in taken:
            raise ModelError(f"projector {plain['type']} has no option {option!r}, but {taken or 'none'}")
    return plain


def build_projector(keys: Mapping[str, Any], input_size: int, output_size: int) -> nn.Module:
    """The projector of `projector_keys`, from C channels to the hidden size H."""
    options = {key: value for key, value in keys.items() if key != "type"}
    return cast(nn.Module, projector_class(keys["type"])(input_size, output_size, **options))


def projected_tokens(keys: Mapping[str, Any], length: int) -> int:
    """How many tokens the projector of `projector_keys` makes of `length` features of one picture, frame or sound."""
    count = getattr(projector_class(keys["type"]), "tokens", None)
    options = {key: value for key, value in keys.items() if key != "type"}
    return count(length, **options) if count else length


def merge_neighbours(
    features: Tensor, shapes: Sequence[tuple[int, ...]], size: int
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Join size x size neighbouring patches of pictures, or `size` neighbours in time of sounds, in their channels.

    What does not fill the last neighbourhood of a side is filled with zeros.

    Args:
        features: [N, C], one item after the other.
        shapes: of each, (height, width) or (length,), whose products sum to N.

    Returns:
        [M, C * size^2] or [M, C * size], and the shapes of the merged items.
    """
    merged = [tuple(-(-side // size) for side in shape) for shape in shapes]
    if size == 1:
        return features, merged
    if len(set(shapes)) == 1:
        return _merge(features.view(len(shapes), *shapes[0], -1), size), merged
    parts = features.split([_product(shape) for shape in shapes])
    return torch.cat(
        [_merge(part.view(1, *shape, -1), size) for part, shape in zip(parts, shapes, strict=True)]
    ), merged


def _merge(x: Tensor, m: int) -> Tensor:
    """x: [n, h, w, C] or [n, p, C]."""
    sides = x.shape[1:-1]
    missing = [-side % m for side in sides]
    if any(missing):
        x = F.pad(x, (0, 0, *(amount for side in reversed(missing) for amount in (0, side))))
    if len(sides) == 1:
        return x.unflatten(1, (-1, m)).flatten(2).flatten(0, 1)
    n, height, width, channels = x.shape
    grid = x.view(n, height // m, m, width // m, m, channels)
    return grid.transpose(2, 3).reshape(-1, m * m * channels)


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] if len(shape) == 2 else shape[0]
