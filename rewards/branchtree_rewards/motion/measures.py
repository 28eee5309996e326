"""Measures of a clip's motion, and the factors that the motion rewards are products of.

Axis letters: N clips or images, F frames, S = F - 1 steps from frame to frame, C channels, H height, W width. Points
(N, 2, H, W) and displacements (N, 2) are (x, y) in pixels of the frame they were measured in; y grows downwards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from branchtree_rewards.shared.pixels import shrunk

WINDOW = 9  # frames: a longer clip is measured in windows of this length
STRIDE = 4  # frames from one window to the next
FAINT = 1e-4  # squared difference of grey levels: a contrast below its root is none
LEAST_SEEN = 0.25  # of a subject: what is left of one that leaves the frame counts in full down to this share
NOISE = 1e-6  # squared difference of grey levels
CUT = 4.0  # deviations at which a Gaussian ends
ROUGH = 0.2  # the roughness at which half of smoothness is left
BOUNCE = 0.25  # the weight of plain acceleration beside excess steps: little, so that a bounce costs little


@dataclass(frozen=True)
class Motion:
    """Measures of N clips."""

    steps: Tensor  # (N, S, 2), the displacement of the whole
    speed: Tensor  # (N, S), the mean length of its pixels' displacements
    excess: Tensor  # (N, S), the mean length of its pixels' excess_steps
    acceleration: Tensor  # (N, S - 1), the mean length of the change from a step to the next
    match: Tensor  # (N, S), how well the first frame's content is found again in each later frame, from 0 to 1


Measure = Callable[[Tensor], Motion]
"""Measures clips (N, F, C, H, W), float in [0, 1]."""


def windows(videos: Tensor) -> Tensor:
    """Cut videos (B, F, ...) into overlapping windows (B, M, at most 9, ...); the last one ends with the video."""
    frames = videos.shape[1]
    if frames <= WINDOW:
        return videos.unsqueeze(1)
    starts = [*range(0, frames - WINDOW, STRIDE), frames - WINDOW]
    return torch.stack([videos[:, start : start + WINDOW] for start in starts], dim=1)


def excess_steps(steps: Tensor) -> Tensor:
    """Return how far each step lies, per axis, from the median of itself and its two neighbours.

    A velocity that rises or falls monotonically over three steps is its own median: a straight path, a slow turn, and
    a bounce off an edge (v, v, -v, -v, or v, v, a, -v, -v with a between them) have no excess. A jump, a stutter, a
    reversal at each frame and noise have. At the ends the neighbour that is missing is extrapolated from the two
    nearest medians (Tukey 1977, the end-point rule).

    Args:
        steps: (S, ...), S >= 2: the steps along the first axis. Each of two steps is half their difference off.

    Returns:
        The differences, of the same shape.
    """
    if len(steps) < 3:
        return (steps - steps.flip(0)) / 2
    inner = _median3(steps[:-2], steps[1:-1], steps[2:])
    second, last_but_one = (inner[1:2], inner[-2:-1]) if len(inner) > 1 else (inner, inner)
    first = _median3(steps[:1], inner[:1], 3 * inner[:1] - 2 * second)
    last = _median3(steps[-1:], inner[-1:], 3 * inner[-1:] - 2 * last_but_one)
    return steps - torch.cat([first, inner, last])


def _median3(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))


def match(found: Tensor, first: Tensor, weight: Tensor, seen: Tensor) -> Tensor:
    """Return how well content is found again: max(0, 1 - ||found - first|| / ||first - its mean||), weighted norms.

    1 where it is unchanged, 0 where it differs as much as a flat field of its mean colour would. Content that never
    had any contrast cannot be found again: 0. If less than a quarter of the weight is still in the frame, the result
    falls in proportion.

    Args:
        found: (N, S, C, H, W), the content of later frames brought back to where it is in the first.
        first: (N, C, H, W), the first frames.
        weight: (N, H, W), which pixels matter.
        seen: Bool (N, S, H, W), false where the content has left the frame.

    Returns:
        (N, S) from 0 to 1.
    """
    share = weight[:, None] * seen
    total = share.sum(dim=(2, 3))
    share = (share / total.clamp_min(1e-20)[:, :, None, None])[:, :, None]
    mean = (share * first[:, None]).sum(dim=(3, 4), keepdim=True)
    contrast = (share * (first[:, None] - mean).square()).sum(dim=(2, 3, 4))
    difference = (share * (found - first[:, None]).square()).sum(dim=(2, 3, 4))
    floor = FAINT * first.shape[1]
    kept = (1 - torch.sqrt((difference + 1e-4 * floor) / (contrast + floor))).clamp_min(0)
    kept = kept * contrast / (contrast + floor)
    return kept * (total / weight.sum(dim=(1, 2))[:, None] / LEAST_SEEN).clamp_max(1)


def explained(moved: Tensor, stayed: Tensor, seen: Tensor) -> Tensor:
    """Return how much better content is explained by moving than by staying, as the square of a contrast.

    ((S - M) / (S + M))^2 where S > M, else 0: M sums the squared differences from the first frame of what has moved,
    S of what lies still, over the frames in which the moved content is seen. It is near 1 on a subject and 0 on the
    background, also on background that the subject comes to cover.

    Args:
        moved, stayed: (N, S, H, W), the squared differences.
        seen: Bool (N, S, H, W).

    Returns:
        (N, H, W) from 0 to 1.
    """
    left, kept = (moved * seen).sum(dim=1), (stayed * seen).sum(dim=1)
    gain: Tensor = ((kept - left) / (kept + left + NOISE)).clamp_min(0)
    return gain.square()


def smooth_motion(motion: Motion, side: int, speed: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three factors of good motion, of each clip (N,), each from 0 to 1.

    With v_t the speed of step t, s = speed * side, e_t the excess and a_t the acceleration:

        moving   = mean_t v_t^2 / (v_t^2 + s^2)
        rough    = (sqrt(mean_t e_t^2) + 0.25 mean_t a_t) / (median_t v_t + s)
        smooth   = 1 / (1 + (rough / 0.2)^2)
        constant = min_t match_t

    Args:
        motion: Measures of N clips.
        side: The frames' shorter side in pixels.
        speed: The speed that has half of ``moving``, in shorter sides a frame.

    Returns:
        moving, smooth, constant.
    """
    least = speed * side
    moving = (motion.speed.square() / (motion.speed.square() + least**2)).mean(dim=1)
    rough = motion.excess.square().mean(dim=1).sqrt() + BOUNCE * motion.acceleration.mean(dim=1)
    smooth = 1 / (1 + (rough / (motion.speed.median(dim=1).values + least) / ROUGH).square())
    return moving, smooth, motion.match.min(dim=1).values


def agreement(steps: Tensor, directions: Tensor) -> Tensor:
    """Return how far displacements go as asked: (|sum_t d_t| + (sum_t d_t) . n) / (2 sum_t |d_t|), from 0 to 1.

    1 on a straight path along n, (1 + cos angle) / 2 on another straight path, 0 on one the other way and on one
    that returns to where it began.

    Args:
        steps: (N, S, 2), the displacements d_t.
        directions: (N, 2), the unit vectors n.

    Returns:
        (N,) from 0 to 1.
    """
    whole = steps.sum(dim=1)
    length = steps.norm(dim=-1).sum(dim=1)
    towards: Tensor = (whole.norm(dim=-1) + (whole * directions).sum(dim=-1)) / (2 * length).clamp_min(1e-6)
    return towards.clamp(0, 1)


def capped(videos: Tensor, longest: int) -> Tensor:
    """Shrink videos (B, F, C, H, W) by averages until no side is longer than ``longest`` pixels; smaller ones pass."""
    if max(videos.shape[-2:]) <= longest:
        return videos
    small: Tensor = shrunk(videos.flatten(0, 1), longest).unflatten(0, videos.shape[:2])
    return small


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
