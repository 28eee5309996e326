"""Motion measured by dense optical flow: displacements are followed from pixel to pixel through a clip.

Axis letters: N clips, F frames, S = F - 1 steps, C channels, H height, W width. Displacements are (x, y) in pixels;
y grows downwards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree_rewards.motion.flow import optical_flow, structure
from branchtree_rewards.motion.models import Motion, excess_steps, explained, match
from branchtree_rewards.motion.sampling import blur, inside, pixel_grid, sample

SMOOTHING = 0.7  # deviation, in pixels, of the blur before flow is measured
RESOLVED = 0.15  # pixels a frame: what moves more slowly counts as background while something else moves
BACKGROUND = 1e-4  # the background's share of weight beside what moves


@dataclass(frozen=True)
class Trajectories:
    """Where the pixels of a clip's first frame go."""

    steps: Tensor  # (N, S, 2, H, W), the displacement of each pixel's content at each step
    found: Tensor  # (N, S, C, H, W), the content of each later frame where the pixel has come to
    seen: Tensor  # bool (N, S, H, W), whether that is in the frame


def flow_motion(clips: Tensor) -> Motion:
    """Measure clips (N, F, C, H, W) by the displacements of the pixels of their first frame.

    A pixel's weight is the product of the smaller eigenvalue of the structure tensor, so that places without texture
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
    """How surely each pixel of the first frame moves, and how well its path explains the clip: (N, H, W)."""
    energy = paths.steps.square().sum(dim=2).mean(dim=1)
    moved = (paths.found - clips[:, :1]).square().mean(dim=2)
    stayed = (clips[:, 1:] - clips[:, :1]).square().mean(dim=2)
    return (energy / (energy + RESOLVED**2)).square() * explained(moved, stayed, paths.seen)


def follow(clips: Tensor, grey: Tensor) -> Trajectories:
    """Chain the flows between the frames of clips (N, F, C, H, W), measured on their grey versions (N, F, 1, H, W)."""
    flows = optical_flow(grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1)).unflatten(0, (len(grey), -1))
    points = pixel_grid(clips).expand(len(clips), -1, -1, -1)
    steps, found, seen = [], [], []
    for number in range(flows.shape[1]):
        step = sample(flows[:, number], points)
        points = points + step
        steps.append(step)
        found.append(sample(clips[:, number + 1], points))
        seen.append(inside(points, *clips.shape[-2:]).squeeze(1))
    return Trajectories(torch.stack(steps, dim=1), torch.stack(found, dim=1), torch.stack(seen, dim=1))
