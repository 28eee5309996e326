"""The images of a prompt: what a replayed pipeline still asks of them is their number and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

SIZES = "image_sizes."
"""What the names of sizes begin with, before the keyword of the images."""


def _images(value: Any) -> list[Image.Image]:
    entries = value if isinstance(value, list | tuple) else [value]
    return list(entries) if entries and all(isinstance(entry, Image.Image) for entry in entries) else []


def image_sizes(extra: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the widths and heights (1, images, 2) of each keyword that holds images."""
    found = {keyword: _images(value) for keyword, value in extra.items()}
    return {
        SIZES + keyword: torch.tensor([[each.size for each in images]]) for keyword, images in found.items() if images
    }


def blank_images(extra: Mapping[str, Any], packed: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return keywords with blank images of the sizes of a batch's first row in the place of their images."""
    blank = dict(extra)
    for keyword, value in extra.items():
        if SIZES + keyword in packed:
            sizes = [size for size in packed[SIZES + keyword][0].tolist() if size[0]]  # zeros are padding
            images = [Image.new("RGB", tuple(size)) for size in sizes]
            blank[keyword] = images if isinstance(value, list | tuple) else images[0]
    return blank


def inverted_images(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords with other images of the same sizes."""
    other = dict(extra)
    for keyword, value in extra.items():
        if images := [ImageOps.invert(image.convert("RGB")) for image in _images(value)]:
            other[keyword] = images if isinstance(value, list | tuple) else images[0]
    return other
