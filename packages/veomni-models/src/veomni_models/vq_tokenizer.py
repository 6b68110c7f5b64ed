"""Pictures as discrete tokens: the VQ autoencoder of Janus, with what it takes to train it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.janus.modeling_janus import JanusVQVAE
from transformers.utils import ModelOutput


@dataclass
class VQTokenizerOutput(ModelOutput):
    """Of a `VQTokenizer`: `decoded_pixel_values` [n, 3, S, S], `embedding_loss` [], and int64 `codes` [n, L]."""

    decoded_pixel_values: Tensor | None = None
    embedding_loss: Tensor | None = None
    codes: Tensor | None = None


class VQTokenizer(JanusVQVAE):
    """`JanusVQVAE` of transformers (`janus_vqgan`) as a tokenizer of pictures, which can be trained.

    Its codebook holds directions: codes are compared and decoded by them alone, so that each is kept at length 1.
    """

    @property
    def num_codes(self) -> int:
        """Entries of the codebook."""
        count: int = self.config.num_embeddings
        return count

    @property
    def num_tokens(self) -> int:
        """Codes of a picture, row by row from its top left."""
        side: int = self.config.num_patches
        return side * side

    @property
    def image_size(self) -> int:
        """Height and width of its pictures in pixels."""
        side: int = self.config.num_patches * 2 ** (len(self.config.channel_multiplier) - 1)
        return side

    @torch.no_grad()
    def codes(self, pixel_values: Tensor) -> Tensor:
        """Pictures [n, 3, S, S] in -1 .. 1 to int64 [n, L]."""
        tokens: Tensor = self.encode(pixel_values.to(self.dtype)).image_tokens
        return tokens.view(len(pixel_values), self.num_tokens)

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """int64 [n, L] to pictures [n, 3, S, S] in -1 .. 1."""
        return self.decode(codes).float().clamp(-1, 1)

    def _init_weights(self, module: Any) -> None:
        """As torch draws them; codes point anywhere."""
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> VQTokenizerOutput:
        """Reconstruct pictures; gradients pass the codebook straight through (https://arxiv.org/abs/1711.00937).

        Args:
            pixel_values: [n, 3, S, S] in -1 .. 1.
            kwargs: not used.
        """
        latents = F.normalize(self.quant_conv(self.encoder(pixel_values)), dim=1)
        quantized, loss, codes = self.quantize(latents)
        decoded = self.decoder(self.post_quant_conv(F.normalize(quantized, dim=1)))
        return VQTokenizerOutput(decoded, loss, codes.view(len(pixel_values), self.num_tokens))

    @torch.no_grad()
    def tidy_codebook(self, unused: Tensor | None = None, pixel_values: Tensor | None = None) -> None:
        """After a step: bring the codes back to length 1, and let `unused` ones start anew where pictures are.

        Args:
            unused: bool [num_codes]; each of them becomes what the encoder makes of some place of `pixel_values`.
            pixel_values: [n, 3, S, S].
        """
        weight = self.quantize.embedding.weight
        if unused is not None and pixel_values is not None and bool(unused.any()):
            latents = self.quant_conv(self.encoder(pixel_values)).movedim(1, -1).flatten(0, 2)
            weight[unused] = latents[torch.randint(len(latents), (int(unused.sum()),), device=latents.device)]
        weight.copy_(F.normalize(weight, dim=-1))
