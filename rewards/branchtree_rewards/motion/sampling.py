"""Small image operations that the motion measures share.

Axis letters: N images, C channels, H height, W width. Points and displacements are (N, 2, H, W) or (N, 2), as (x, y)
in pixels; y grows downwards.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CUT = 4.0  # deviations at which a Gaussian ends


def capped(videos: Tensor, longest: int) -> Tensor:
    """Shrink videos (B, F, C, H, W) by averages until no side is longer than ``longest`` pixels; smaller ones pass."""
    height, width = videos.shape[-2:]
    scale = longest / max(height, width)
    if scale >= 1:
        return videos
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    shrunk: Tensor = F.adaptive_avg_pool2d(videos.flatten(0, 1), size)
    return shrunk.view(*videos.shape[:3], *size)


def blur(images: Tensor, deviation: float) -> Tensor:
    """Blur images (..., H, W) by products with banded Gaussian matrices, cut and renormalised at an edge.

    ``deviation`` is in pixels.
    """
    height, width = images.shape[-2:]
    down, across = _blur_matrix(height, deviation, images), _blur_matrix(width, deviation, images)
    blurred: Tensor = down @ (images @ across.mT)
    return blurred


def _blur_matrix(length: int, deviation: float, like: Tensor) -> Tensor:
    index = torch.arange(length, device=like.device, dtype=like.dtype)
    away = (index[:, None] - index[None, :]).abs() / deviation
    kernel = torch.exp(-0.5 * away.clamp_max(CUT) ** 2) * (away < CUT)
    return kernel / kernel.sum(dim=1, keepdim=True)


def pixel_grid(like: Tensor) -> Tensor:
    """Return the points (1, 2, H, W) of the pixels of images (..., H, W)."""
    height, width = like.shape[-2:]
    y = torch.arange(height, device=like.device, dtype=like.dtype)
    x = torch.arange(width, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))[None]


def sample(images: Tensor, points: Tensor) -> Tensor:
    """Read images (N, C, H, W) at points (N, 2, h, w), bilinearly; beyond the edge the edge's value: (N, C, h, w)."""
    height, width = images.shape[-2:]
    x = points[:, 0] * (2 / (width - 1)) - 1
    y = points[:, 1] * (2 / (height - 1)) - 1
    grid = torch.stack([x, y], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)


def inside(points: Tensor, height: int, width: int) -> Tensor:
    """Return which points (N, 2, h, w) lie within the frame: bool (N, 1, h, w)."""
    x, y = points[:, :1], points[:, 1:]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
