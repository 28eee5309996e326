"""The denoiser: a transformer that sees all positions and predicts each one's token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from branchtree_tokens.tasks import MASK, VOCABULARY

CAP = 30.0
"""Logits lie between plus and minus this, so that nothing the network says is certain."""


class Block(nn.Module):
    """Attention and a feed-forward layer, each on normalised inputs."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n, width) to the same shape."""
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        after: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return after


class Transformer(nn.Module):
    """Logits of each position's token, from the tokens known so far and the share of steps that are still to come.

    ``coordinates`` (n, k) integers say what positions have in common.
    """

    def __init__(self, coordinates: Tensor, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(MASK + 1, width)
        # Each value of each coordinate has an embedding of its own: a position is the sum of its coordinates'.
        sizes = coordinates.amax(0) + 1
        self.register_buffer("indices", coordinates + sizes.cumsum(0) - sizes, persistent=False)
        self.coordinates = nn.Embedding(int(sizes.sum()), width)
        self.noise = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(VOCABULARY))

    def forward(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Map tokens (B, n) at sigma (B,) to logits (B, n, V)."""
        noise = self.noise(sigma[:, None].to(self.noise.weight.dtype))
        x = self.tokens(tokens) + self.coordinates(self.indices).sum(1) + noise[:, None]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return CAP * torch.tanh(logits / CAP)
