"""MUSIQ (arXiv 2108.05997): the quality of a picture by a transformer that sees it at several scales.

Written after the paper and Google's release (google-research/musiq, Apache-2.0), for weights under the names of the
converted checkpoints that VBench uses. Numbers that the release leaves to its framework, such as the exact GELU and the
unbiased deviation of a kernel, are those which these checkpoints are run with.
Axis letters: N pictures, P patches, E embedding, C channels.
"""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from branchtree_rewards.vbench.musiq_patches import PATCH, pieces

GROUPS = 32
STEM = PATCH // 4  # cells along a patch's side after the stem


Count = Annotated[int, pydantic.Field(ge=1)]


class MusiqSizes(pydantic.BaseModel, extra="forbid", frozen=True):
    """The sizes of a MUSIQ; by default the published ones, 27,125,825 numbers in 248 tensors."""

    width: Count = 384
    layers: Count = 14
    heads: Count = 6
    inner: Count = 1152  # of the transformer's feed-forward layers
    stem: Count = 64  # channels of the first convolution
    stem_out: Count = 256  # channels of a patch before it is embedded
    grid: Count = 10  # cells along a side of the table of places
    lengths: tuple[Count, ...] = (224, 384)  # longer sides of the scales besides the picture's own

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> MusiqSizes:
        if self.width % self.heads or self.stem % GROUPS or self.stem_out % GROUPS:
            raise ValueError(f"width must be a multiple of heads, and stem and stem_out multiples of {GROUPS}")
        return self


class StandardisedConv(nn.Conv2d):
    """A convolution without bias whose kernels are shifted and scaled to mean 0 and deviation 1 before use."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)
        # TensorFlow's "SAME": an odd pixel of padding comes last.
        spare = kernel - stride if stride > 1 else kernel - 1
        self.around = (spare // 2, spare - spare // 2) * 2

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W), H and W multiples of the stride."""
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = self.weight.std(dim=(1, 2, 3), keepdim=True)
        kernel = (self.weight - mean) / (deviation + 1e-5)
        return functional.conv2d(functional.pad(images, self.around), kernel, stride=self.stride)


class Bottleneck(nn.Module):
    """The stem's one residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.gn1 = StandardisedConv(inputs, inputs, 1), _group_norm(inputs)
        self.conv2, self.gn2 = StandardisedConv(inputs, inputs, 3), _group_norm(inputs)
        self.conv3, self.gn3 = StandardisedConv(inputs, outputs, 1), _group_norm(outputs)
        self.conv_proj, self.gn_proj = StandardisedConv(inputs, outputs, 1), _group_norm(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) at the same size."""
        inner = functional.relu(self.gn1(self.conv1(images)))
        inner = functional.relu(self.gn2(self.conv2(inner)))
        return functional.relu(self.gn3(self.conv3(inner)) + self.gn_proj(self.conv_proj(images)))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-4)


class Attention(nn.Module):
    """Self-attention over all patches of a picture."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, P, E)."""
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended


class Mlp(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, P, E)."""
        result: Tensor = self.fc2(functional.gelu(self.fc1(tokens)))
        return result


class Block(nn.Module):
    """One block of the transformer, with the norms before its parts."""

    def __init__(self, sizes: MusiqSizes) -> None:
        super().__init__()
        self.norm1, self.norm2 = _layer_norm(sizes.width), _layer_norm(sizes.width)
        self.attention = Attention(sizes.width, sizes.heads)
        self.mlp = Mlp(sizes.width, sizes.inner)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, P, E)."""
        tokens = tokens + self.attention(self.norm1(tokens))
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


def _layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


class Places(nn.Module):
    """An embedding for each cell of a grid."""

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        self.position_emb = nn.Parameter(torch.empty(1, grid**2, width))


class Scales(nn.Module):
    """An embedding for each scale."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.scale_emb = nn.Parameter(torch.empty(count, width))


class Encoder(nn.Module):
    """The transformer: patches with their places and scales, a token that gathers, and blocks."""

    def __init__(self, sizes: MusiqSizes) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.empty(1, 1, sizes.width))
        self.posembed_input = Places(sizes.grid, sizes.width)
        self.scaleembed_input = Scales(len(sizes.lengths) + 1, sizes.width)
        self.encoder_norm = _layer_norm(sizes.width)
        self.transformer = nn.ModuleDict({f"encoderblock_{index}": Block(sizes) for index in range(sizes.layers)})

    def forward(self, tokens: Tensor, places: Tensor, scales: Tensor) -> Tensor:
        """What the first token says (N, E) of tokens (N, P, E) at ``places`` (P,) and ``scales`` (P,)."""
        tokens = tokens + self.posembed_input.position_emb[0, places] + self.scaleembed_input.scale_emb[scales]
        tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.transformer.values():
            tokens = block(tokens)
        result: Tensor = self.encoder_norm(tokens[:, 0])
        return result


class Musiq(nn.Module):
    """Pictures to their quality, about 0 to 100 with the weights of SPAQ."""

    def __init__(self, sizes: MusiqSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.conv_root = StandardisedConv(3, sizes.stem, 7, stride=2)
        self.gn_root = nn.GroupNorm(GROUPS, sizes.stem, eps=1e-6)
        self.block1 = Bottleneck(sizes.stem, sizes.stem_out)
        self.embedding = nn.Linear(STEM**2 * sizes.stem_out, sizes.width)
        self.transformer_encoder = Encoder(sizes)
        self.head = nn.Linear(sizes.width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Qualities (N,) of pictures (N, 3, H, W) in [0, 1]."""
        cut = pieces((images - 0.5) * 2, self.sizes.lengths, self.sizes.grid)
        tokens = self._embedded(cut.patches.flatten(0, 1)).unflatten(0, cut.patches.shape[:2])
        quality: Tensor = self.head(self.transformer_encoder(tokens, cut.places, cut.scales))
        return quality.squeeze(1)

    def _embedded(self, patches: Tensor) -> Tensor:
        """Patches (P, 3, 32, 32) as tokens (P, E)."""
        cells = functional.relu(self.gn_root(self.conv_root(patches)))
        cells = functional.max_pool2d(functional.pad(cells, (0, 1, 0, 1)), 3, stride=2)
        cells = self.block1(cells)
        tokens: Tensor = self.embedding(cells.permute(0, 2, 3, 1).flatten(1))
        return tokens
