"""How MUSIQ cuts pictures into patches: at several scales, each patch with its place and its scale.

Axis letters: N pictures, P patches, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

PATCH = 32  # pixels along a side; patches do not overlap


@dataclass(frozen=True)
class Pieces:
    """Pictures of one size, cut alike."""

    patches: Tensor  # (N, P, C, 32, 32)
    places: Tensor  # int64 (P,), a cell of the grid, row by row
    scales: Tensor  # int64 (P,), 0 for the smallest; the picture's own is last


def pieces(images: Tensor, lengths: tuple[int, ...], grid: int) -> Pieces:
    """Cut pictures (N, C, H, W), with each length in turn as their longer side and then as they are.

    The publisher fills the smaller scales up with patches that attention masks. They take no part in any score, and are
    left out here.
    """
    scaled = [*(resize_picture(images, length) for length in sorted(lengths)), images]
    patches = [split(each) for each in scaled]
    places = [hashed_places(*_counts(each), grid).to(images.device) for each in scaled]
    scales = [torch.full_like(place, index) for index, place in enumerate(places)]
    return Pieces(torch.cat(patches, dim=1), torch.cat(places), torch.cat(scales))


def resize_picture(images: Tensor, length: int) -> Tensor:
    """Pictures (N, C, H, W) with ``length`` as their longer side, bicubic, without antialiasing."""
    height, width = images.shape[-2:]
    ratio = length / max(height, width)
    new = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    return functional.interpolate(images, new, mode="bicubic", align_corners=False, antialias=False)


def _counts(images: Tensor) -> tuple[int, int]:
    """How many patches there are down and across."""
    return -(-images.shape[-2] // PATCH), -(-images.shape[-1] // PATCH)


def split(images: Tensor) -> Tensor:
    """Patches (N, P, C, 32, 32) of pictures (N, C, H, W), row by row; zeros around fill up, an odd one comes last."""
    down, across = -images.shape[-2] % PATCH, -images.shape[-1] % PATCH
    whole = functional.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))
    rows, columns = _counts(images)
    cut = whole.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))
    patches: Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return patches


def hashed_places(rows: int, columns: int, grid: int) -> Tensor:
    """The cell of a ``grid`` x ``grid`` table, int64 (rows * columns,), on which each patch of a picture falls."""
    down, across = (_nearest(count, grid) for count in (rows, columns))
    return (down[:, None] * grid + across[None, :]).flatten()


def _nearest(count: int, grid: int) -> Tensor:
    line = torch.arange(grid, dtype=torch.float32)[None, None]
    nearest: Tensor = functional.interpolate(line, count, mode="nearest")
    return nearest[0, 0].long()
