"""Motion measured by dense optical flow: displacements are followed from pixel to pixel through a clip.

The flow between two frames is coarse-to-fine Lucas-Kanade (Lucas and Kanade 1981; Bouguet 2000). Axis letters: N clips
or pairs of frames, F frames, S = F - 1 steps, C channels, H height, W width. Displacements are (x, y) in pixels; y
grows downwards.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from branchtree_rewards.motion.measures import Motion, blur, excess_steps, explained, inside, match, pixel_grid, sample

SMOOTHING = 0.7  # deviation, in pixels, of the blur before flow is measured
RESOLVED = 0.15  # pixels a frame: what moves more slowly counts as background while something else moves
BACKGROUND = 1e-4  # the background's share of weight beside what moves
COARSEST = 8  # pixels: no level of the pyramid has a shorter side below this
ANTIALIAS = 1.0  # deviation, in pixels, of the blur before a level is halved
ITERATIONS = 4  # per level
WINDOW = 2.0  # deviation, in pixels, of the window over which a displacement is taken to be constant
CONTRAST = 1e-3  # gradients (per pixel) below this are noise, and carry no displacement
REGULARITY = 0.02  # of the finest level's mean structure: what a level must show to move displacements


@dataclass(frozen=True)
class Trajectories:
    """Paths of the pixels of a clip's first frame."""

    steps: Tensor  # (N, S, 2, H, W), the displacement of each pixel's content at each step
    found: Tensor  # (N, S, C, H, W), the content of each later frame where the pixel has come to
    seen: Tensor  # bool (N, S, H, W), whether that is in the frame


def flow_motion(clips: Tensor) -> Motion:
    """Measure clips (N, F, C, H, W) by the displacements of the pixels of their first frame.

    A pixel's weight is the product of the smaller eigenvalue of the structure tensor, so that areas without texture
    do not count, and of how surely it moves and how well that explains the clip, so that a still background, or what
    the subject comes to cover, does not count.
    """
    clips = blur(clips, SMOOTHING)
    grey = clips.mean(dim=2, keepdim=True)
    paths = follow(clips, grey)
    weight = (structure(grey[:, 0]).corner.squeeze(1) + 1e-12) * (_moving(clips, paths) + BACKGROUND)
    share = weight / weight.sum(dim=(1, 2), keepdim=True)

    def mean(values: Tensor) -> Tensor:
        return (values * share[:, None]).sum(dim=(2, 3))

    excess = excess_steps(paths.steps.transpose(0, 1)).transpose(0, 1)
    return Motion(
        steps=torch.stack([mean(paths.steps[:, :, 0]), mean(paths.steps[:, :, 1])], dim=-1),
        speed=mean(_length(paths.steps)),
        excess=mean(_length(excess)),
        acceleration=mean(_length(paths.steps.diff(dim=1))),
        match=match(paths.found, clips[:, 0], weight, paths.seen),
    )


def _length(fields: Tensor) -> Tensor:
    return torch.hypot(fields[:, :, 0], fields[:, :, 1])


def _moving(clips: Tensor, paths: Trajectories) -> Tensor:
    """Return how surely each pixel of the first frame moves, and its path explains the clip: (N, H, W) from 0 to 1."""
    energy = paths.steps.square().sum(dim=2).mean(dim=1)
    moved = (paths.found - clips[:, :1]).square().mean(dim=2)
    stayed = (clips[:, 1:] - clips[:, :1]).square().mean(dim=2)
    return (energy / (energy + RESOLVED**2)).square() * explained(moved, stayed, paths.seen)


def follow(clips: Tensor, grey: Tensor) -> Trajectories:
    """Chain the flows between the frames of clips (N, F, C, H, W), measured on their grey versions (N, F, 1, H, W)."""
    flows = optical_flow(grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1)).unflatten(0, (len(grey), -1))
    points = pixel_grid(clips).expand(len(clips), -1, -1, -1)
    steps, found, seen = [], [], []
    for i in range(flows.shape[1]):
        step = sample(flows[:, i], points)
        points = points + step
        steps.append(step)
        found.append(sample(clips[:, i + 1], points))
        seen.append(inside(points, *clips.shape[-2:]).squeeze(1))
    return Trajectories(torch.stack(steps, dim=1), torch.stack(found, dim=1), torch.stack(seen, dim=1))


@dataclass(frozen=True)
class Structure:
    """A frame's structure around each pixel, which tells displacements; see Shi and Tomasi 1994."""

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
    """Return the windowed structure tensor of frames (N, 1, H, W)."""
    padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    products = blur(torch.cat([across * across, across * down, down * down], dim=1), WINDOW)
    return Structure(torch.cat([across, down], dim=1), products[:, :1], products[:, 1:2], products[:, 2:])


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Return the displacement that takes each pixel of ``first`` to where it is in ``second``.

    Minimises sum_window (second(x + u) - first(x))^2 by Gauss-Newton steps, from the coarsest level of a pyramid to
    the finest. After each step displacements are averaged with weights that say how well each is determined, so that
    flat areas take over their neighbours'.

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
