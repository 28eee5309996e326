"""Pictures of words, drawn by PIL in fonts that come with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor


def written(
    lines: Sequence[str], font: str = "DejaVuSans-Bold", size: int = 24, canvas: tuple[int, int] = (128, 32)
) -> Tensor:
    """Return a picture (3, H, W) in [0, 1] of black lines on white, spread over its height."""
    picture = Image.new("RGB", canvas, "white")
    face = ImageFont.truetype(Path(matplotlib.get_data_path()) / f"fonts/ttf/{font}.ttf", size)
    for row, line in enumerate(lines):
        middle = (canvas[0] / 2, canvas[1] * (row + 0.5) / len(lines))
        ImageDraw.Draw(picture).text(middle, line, fill="black", font=face, anchor="mm")
    return pil_to_tensor(picture) / 255


def written_words(words: Sequence[str], **settings: object) -> Tensor:
    """Return pictures (N, 3, H, W) of a word each."""
    return torch.stack([written([word], **settings) for word in words])  # type: ignore[arg-type]
