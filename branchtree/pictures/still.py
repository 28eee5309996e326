"""Pictures of pixels: scaled, arranged in a grid, and as a PNG file's content."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

THUMBNAIL = 96  # pixels of a thumbnail's longer side
TILE = 256  # pixels of the longer side in a grid; small pictures are enlarged up to a quarter of it


def to_image(pixels: Tensor) -> Image.Image:
    """Return one image (C, H, W) in [0, 1], with C 3 or 1, in RGB."""
    array = (pixels.expand(3, -1, -1).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Shrink an image to at most ``side`` on its longer side, or enlarge a small one by a whole factor."""
    longest = max(image.size)
    if longest > side:
        return image.resize([max(1, round(length * side / longest)) for length in image.size], Image.Resampling.LANCZOS)
    factor = max(1, side // 4 // longest)
    return image.resize([length * factor for length in image.size], Image.Resampling.NEAREST)


def tiled(tiles: Sequence[Image.Image], columns: int, gap: int = 0) -> Image.Image:
    """Arrange pictures of one size row by row, ``columns`` in a row, with ``gap`` grey pixels between them."""
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (128,) * 3 if gap else 0)
    for index, tile in enumerate(tiles):
        grid.paste(tile, (index % columns * (width + gap), index // columns * (height + gap)))
    return grid


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
