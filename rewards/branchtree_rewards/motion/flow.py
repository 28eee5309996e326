"""Dense optical flow between two frames: coarse-to-fine Lucas-Kanade (Lucas and Kanade 1981; Bouguet 2000).

Axis letters: N pairs of frames, H height, W width. A flow is (N, 2, H, W), as (x, y) in pixels; y grows downwards.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from branchtree_rewards.motion.sampling import blur, inside, pixel_grid, sample

COARSEST = 8  # pixels: no level of the pyramid has a shorter side below this
ANTIALIAS = 1.0  # deviation, in pixels, of the blur before a level is halved
ITERATIONS = 4  # per level
WINDOW = 2.0  # deviation, in pixels, of the window over which a displacement is taken to be constant
CONTRAST = 1e-3  # gradients (per pixel) below this are noise, and carry no displacement
REGULARITY = 0.02  # of the finest level's mean structure: what a level must show to move displacements


@dataclass(frozen=True)
class Structure:
    """What a frame tells of displacements around each pixel; see Shi and Tomasi 1994."""

    gradient: Tensor  # (N, 2, H, W)
    xx: Tensor  # (N, 1, H, W), windowed products of the gradient
    xy: Tensor
    yy: Tensor

    @property
    def corner(self) -> Tensor:
        """The smaller eigenvalue (N, 1, H, W): 0 where some direction of motion cannot be seen."""
        half = (self.xx + self.yy) / 2
        spread = torch.sqrt(((self.xx - self.yy) / 2) ** 2 + self.xy**2)
        return (half - spread).clamp_min(0)


def structure(frames: Tensor) -> Structure:
    """The windowed structure tensor of frames (N, 1, H, W)."""
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    products = blur(torch.cat([across * across, across * down, down * down], dim=1), WINDOW)
    return Structure(torch.cat([across, down], dim=1), products[:, :1], products[:, 1:2], products[:, 2:])


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """The displacement that takes each pixel of ``first`` to its place in ``second``.

    Minimises sum_window (second(x + u) - first(x))^2 by Gauss-Newton steps, from the coarsest level of a pyramid to
    the finest. After each step displacements are averaged with weights that say how well each is determined, so that
    flat places take over their neighbours'.

    Args:
        first: Grey frames, float (N, 1, H, W) in [0, 1].
        second: The frames that follow them.

    Returns:
        The flow (N, 2, H, W) in pixels.
    """
    levels = [(first, second)]
    while min(levels[-1][0].shape[-2:]) >= 2 * COARSEST:
        before, after = (F.avg_pool2d(blur(level, ANTIALIAS), 2) for level in levels[-1])
        levels.append((before, after))
    seen = structure(first)
    floor = REGULARITY * (seen.xx + seen.yy).mean(dim=(2, 3), keepdim=True) + CONTRAST**2
    flow = torch.zeros_like(levels[-1][0]).repeat(1, 2, 1, 1)
    for before, after in reversed(levels):
        if flow.shape[-2:] != before.shape[-2:]:
            flow = 2 * F.interpolate(flow, before.shape[-2:], mode="bilinear", align_corners=False)
        flow = _refined(before, after, flow, floor)
    return flow


def _refined(first: Tensor, second: Tensor, flow: Tensor, floor: Tensor) -> Tensor:
    seen = structure(first)
    xx, yy = seen.xx + floor, seen.yy + floor
    determinant = xx * yy - seen.xy**2
    trust = seen.corner + floor / 10
    total = blur(trust, WINDOW)
    grid = pixel_grid(first)
    for _ in range(ITERATIONS):
        points = grid + flow
        change = (first - sample(second, points)) * inside(points, *first.shape[-2:])
        pull = blur(seen.gradient * change, WINDOW)
        step_x = (yy * pull[:, :1] - seen.xy * pull[:, 1:]) / determinant
        step_y = (xx * pull[:, 1:] - seen.xy * pull[:, :1]) / determinant
        flow = flow + torch.cat([step_x, step_y], dim=1).clamp(-1, 1)
        flow = blur(flow * trust, WINDOW) / total
    return flow
