"""MUSIQ (arXiv 2108.05997): the quality of a picture by a transformer that sees it at several scales.

Written after the paper and Google's release (google-research/musiq, Apache-2.0), for weights under the names of the
converted checkpoints that VBench uses. Numbers that the release leaves to its framework, such as the exact GELU and the
unbiased deviation of a kernel, are those which these checkpoints are run with.
Axis letters: N pictures, P patches, E embedding, C channels, H height, W width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from branchtree_rewards.vbench.base import margins

PATCH = 32  # pixels along a side; patches do not overlap
STEM = PATCH // 4  # cells along a patch's side after the stem
GROUPS = 32
LAYER_EPS = 1e-6

Count = Annotated[int, pydantic.Field(ge=1)]


class MusiqSizes(pydantic.BaseModel, extra="forbid", frozen=True):
    """The sizes of a MUSIQ; by default the published ones, 27,125,825 numbers in 248 tensors."""

    width: Count = 384
    layers: Count = 14
    heads: Count = 6
    inner: Count = 1152  # of the transformer's feed-forward layers
    stem: Count = 64  # channels of the first convolution
    stem_out: Count = 256  # channels of a patch before it is embedded
    grid: Count = 10  # cells along a side of the table of positions
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
        """Convolve images (N, C, H, W), H and W multiples of the stride."""
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = self.weight.std(dim=(1, 2, 3), keepdim=True)
        kernel = (self.weight - mean) / (deviation + 1e-5)
        return functional.conv2d(functional.pad(images, self.around), kernel, stride=self.stride)


class Bottleneck(nn.Module):
    """The stem's one residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        norm = partial(nn.GroupNorm, GROUPS, eps=1e-4)
        self.conv1, self.gn1 = StandardisedConv(inputs, inputs, 1), norm(inputs)
        self.conv2, self.gn2 = StandardisedConv(inputs, inputs, 3), norm(inputs)
        self.conv3, self.gn3 = StandardisedConv(inputs, outputs, 1), norm(outputs)
        self.conv_proj, self.gn_proj = StandardisedConv(inputs, outputs, 1), norm(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to as many of the same size."""
        inner = functional.relu(self.gn1(self.conv1(images)))
        inner = functional.relu(self.gn2(self.conv2(inner)))
        return functional.relu(self.gn3(self.conv3(inner)) + self.gn_proj(self.conv_proj(images)))


class Attention(nn.Module):
    """Self-attention over all patches of a picture."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, P, E) to as many."""
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended


class Block(nn.Module):
    """One block of the transformer, with a norm before attention and one before the feed-forward layers."""

    def __init__(self, sizes: MusiqSizes) -> None:
        super().__init__()
        width, inner = sizes.width, sizes.inner
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=LAYER_EPS), nn.LayerNorm(width, eps=LAYER_EPS)
        self.attention = Attention(width, sizes.heads)
        layers = {"fc1": nn.Linear(width, inner), "gelu": nn.GELU(), "fc2": nn.Linear(inner, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, P, E) to as many."""
        tokens = tokens + self.attention(self.norm1(tokens))
        result: Tensor = tokens + self.mlp(self.norm2(tokens))
        return result


class Encoder(nn.Module):
    """The transformer: patches with their positions and scales, a token that gathers, and blocks."""

    def __init__(self, sizes: MusiqSizes) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.empty(1, 1, sizes.width))
        positions, scales = torch.empty(1, sizes.grid**2, sizes.width), torch.empty(len(sizes.lengths) + 1, sizes.width)
        self.posembed_input = nn.ParameterDict({"position_emb": positions})
        self.scaleembed_input = nn.ParameterDict({"scale_emb": scales})
        self.encoder_norm = nn.LayerNorm(sizes.width, eps=LAYER_EPS)
        self.transformer = nn.ModuleDict({f"encoderblock_{index}": Block(sizes) for index in range(sizes.layers)})

    def forward(self, tokens: Tensor, cells: Tensor, scales: Tensor) -> Tensor:
        """Return what the gathering token says (N, E).

        Args:
            tokens: Embedded patches (N, P, E).
            cells: int64 (P,), the cell of the grid that each patch falls on.
            scales: int64 (P,), the scale that each patch is of.
        """
        positions, scale_table = self.posembed_input["position_emb"][0], self.scaleembed_input["scale_emb"]
        tokens = tokens + positions[cells] + scale_table[scales]
        tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.transformer.values():
            tokens = block(tokens)
        result: Tensor = self.encoder_norm(tokens[:, 0])
        return result


class Musiq(nn.Module):
    """Maps pictures to their quality, about 0 to 100 with the weights of SPAQ."""

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
        """Return the qualities (N,) of pictures (N, 3, H, W) in [0, 1]."""
        cut = pieces((images - 0.5) * 2, self.sizes.lengths, self.sizes.grid)
        cells = functional.relu(self.gn_root(self.conv_root(cut.patches.flatten(0, 1))))
        cells = self.block1(functional.max_pool2d(functional.pad(cells, (0, 1, 0, 1)), 3, stride=2))
        tokens = self.embedding(cells.permute(0, 2, 3, 1).flatten(1)).unflatten(0, cut.patches.shape[:2])
        quality: Tensor = self.head(self.transformer_encoder(tokens, cut.cells, cut.scales))
        return quality.squeeze(1)


@dataclass(frozen=True)
class Pieces:
    """Pictures of one size, cut alike."""

    patches: Tensor  # (N, P, C, 32, 32)
    cells: Tensor  # int64 (P,), a cell of the grid, row by row
    scales: Tensor  # int64 (P,), 0 for the smallest; the picture's own is last


def pieces(images: Tensor, lengths: tuple[int, ...], grid: int) -> Pieces:
    """Cut pictures (N, C, H, W), with each length in turn as their longer side, bicubic, and then as they are.

    The publisher fills the smaller scales up with patches that attention masks. No score depends on them, and they are
    left out here.
    """
    height, width = images.shape[-2:]
    scaled = []
    for length in sorted(lengths):
        ratio = length / max(height, width)
        new = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        scaled.append(functional.interpolate(images, new, mode="bicubic", align_corners=False, antialias=False))
    scaled.append(images)
    patches = torch.cat([split(each) for each in scaled], dim=1)
    cells = [hashed_cells(*_counts(each), grid).to(images.device) for each in scaled]
    scales = [torch.full_like(each, index) for index, each in enumerate(cells)]
    return Pieces(patches, torch.cat(cells), torch.cat(scales))


def _counts(images: Tensor) -> tuple[int, int]:
    """Return how many patches there are down and across."""
    return -(-images.shape[-2] // PATCH), -(-images.shape[-1] // PATCH)


def split(images: Tensor) -> Tensor:
    """Cut pictures (N, C, H, W) row by row into patches (N, P, C, 32, 32); zeros around fill up, an odd one last."""
    rows, columns = _counts(images)
    whole = functional.pad(images, margins(images.shape[-2], images.shape[-1], PATCH))
    cut = whole.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))
    patches: Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return patches


def hashed_cells(rows: int, columns: int, grid: int) -> Tensor:
    """Return the cell of a ``grid`` x ``grid`` table that each patch of a picture falls on, int64 (rows * columns,)."""
    line = torch.arange(grid, dtype=torch.float32)[None, None]
    down, across = (functional.interpolate(line, count, mode="nearest")[0, 0].long() for count in (rows, columns))
    return (down[:, None] * grid + across[None, :]).flatten()
