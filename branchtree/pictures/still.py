"""Pixels as pictures a person can look at: scaled, laid out, and as a PNG file's content."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

THUMBNAIL = 96  # pixels of a thumbnail's longer side
TILE = 256  # the same in a grid; small pictures are enlarged to a quarter of it


def to_image(pixels: Tensor) -> Image.Image:
    """One image (C, H, W) in [0, 1], C being 3 or 1, in RGB."""
    array = (pixels.expand(3, -1, -1).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Shrink so that the longer side is at most ``side``; enlarge by whole numbers while it is below a quarter."""
    longest = max(image.size)
    if longest > side:
        return image.resize([max(1, round(length * side / longest)) for length in image.size], Image.Resampling.LANCZOS)
    factor = max(1, side // 4 // longest)
    return image.resize([length * factor for length in image.size], Image.Resampling.NEAREST)


def tiled(tiles: Sequence[Image.Image], columns: int, gap: int = 0) -> Image.Image:
    """Pictures of one size row by row, ``columns`` a row, with ``gap`` grey pixels between them."""
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (128,) * 3 if gap else 0)
    for place, tile in enumerate(tiles):
        grid.paste(tile, (place % columns * (width + gap), place // columns * (height + gap)))
    return grid


def png(image: Image.Image) -> bytes:
    """An image as a PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
