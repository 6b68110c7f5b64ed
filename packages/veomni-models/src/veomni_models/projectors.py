"""From an encoder's features to the foundation model's embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLPProjector(nn.Module):
    """Merges neighbouring patches, normalises them, and maps them by two linear layers with GELU between.

    Args:
        input_size: channels C of the encoder's patch features.
        output_size: hidden size H of the foundation model.
        merge_size: m x m neighbouring patches become one token.
    """

    def __init__(self, input_size: int, output_size: int, merge_size: int = 1) -> None:
        super().__init__()
        self.merge_size = merge_size
        merged = input_size * merge_size**2
        self.norm = nn.LayerNorm(merged)
        self.up = nn.Linear(merged, output_size)
        self.down = nn.Linear(output_size, output_size)

    def forward(self, features: Tensor) -> Tensor:
        """Map [n, P, C], the P patches of n pictures in rows of sqrt(P), to [n, P / m^2, H]."""
        n, patches, channels = features.shape
        side, m = int(patches**0.5), self.merge_size
        grid = features.view(n, side // m, m, side // m, m, channels)
        merged = grid.transpose(2, 3).reshape(n, (side // m) ** 2, m * m * channels)
        return self.down(torch.nn.functional.gelu(self.up(self.norm(merged))))
