"""Tracking of a clip's subject: its first frame is the template, matched at every displacement in every frame.

Unlike optical flow it takes no gradients and chains nothing from frame to frame: the search is over all displacements
at once, by Fourier transform, so that errors do not add up. Axis letters: N clips,
F frames, C channels, H height, W width. Displacements are (x, y) in pixels; y grows downwards.
"""

import torch
from torch import Tensor

from branchtree_rewards.motion.measures import (
    NOISE,
    Motion,
    blur,
    excess_steps,
    explained,
    inside,
    match,
    pixel_grid,
    sample,
)

SMOOTHING = 0.7  # deviation, in pixels, of the blur before matching
PASSES = 3  # of matching, each with a better idea of where the subject is
LEAST_OVERLAP = 0.25  # of the subject's weight: a displacement that pushes more of it out of the frame is not tried
NEARNESS = 4.0  # of the contrast: the cost of a step as long as the frame's diagonal
REFINEMENTS = (0.5, 0.5, 0.25)  # pixels between the points of the paraboloids
FLAT = 0.02  # of the product of its bends: a paraboloid with a smaller determinant has no certain minimum
SPREAD = 3.0  # deviation, in pixels, of the blur of a subject's weights: an outline alone may be straight
LEAST = 1e-3  # the weight that a pixel keeps however badly it is explained


def subject_motion(clips: Tensor) -> Motion:
    """Measure clips (N, F, C, H, W) by the displacement of their subject as a whole."""
    clips = blur(clips, SMOOTHING)
    displacement, subject = track(clips.mean(dim=2))
    steps = displacement.diff(dim=1)
    points = pixel_grid(clips) + displacement[:, 1:].flatten(0, 1)[..., None, None]
    moved = sample(clips[:, 1:].flatten(0, 1), points).view_as(clips[:, 1:])
    seen = inside(points, *clips.shape[-2:]).view_as(clips[:, 1:, 0])
    return Motion(
        steps=steps,
        speed=steps.norm(dim=-1),
        excess=excess_steps(steps.transpose(0, 1)).norm(dim=-1).T,
        acceleration=steps.diff(dim=1).norm(dim=-1),
        match=match(moved, clips[:, 0], subject, seen),
    )


def track(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Follow what moves in grey clips (N, F, H, W).

    Returns its displacement (N, F, 2) from the first frame, and the weight (N, H, W) of each pixel of that frame.

    The subject's weight w starts as how much each pixel of the first frame changes. The displacement u of frame t
    minimises the mean of (I_0(x) - I_t(x + u))^2 with these weights, what leaves the frame being charged with the
    subject's own contrast, and a little for the distance from the frame before. Pixels that such displacements explain
    no better than staying where they are then lose their weight, and the search is repeated. At last the minimum is
    found to a fraction of a pixel.
    """
    clips = clips - clips[:, :1].mean(dim=(2, 3), keepdim=True)
    padded = (2 * clips.shape[-2], 2 * clips.shape[-1])
    spectra = (torch.fft.rfft2(clips, s=padded), torch.fft.rfft2(clips**2, s=padded))
    # Early changes count most: what moves changes at once; what it comes to cover, only when it is reached.
    frames = torch.arange(1, clips.shape[1], device=clips.device, dtype=clips.dtype)
    weights = (1 / frames**2)[None, :, None, None]
    change = blur((weights * (clips[:, 1:] - clips[:, :1]).square()).sum(dim=1) / weights.sum(), SPREAD)
    subject, displacement = change + NOISE, clips.new_zeros(*clips.shape[:2], 2)
    for i in range(PASSES):
        displacement = _best_displacements(clips, spectra, subject)
        if i < PASSES - 1:
            subject = (change + NOISE) * _moving(clips, displacement)
    return _refined(clips, subject, displacement), subject


def _refined(clips: Tensor, subject: Tensor, displacement: Tensor) -> Tensor:
    """Move displacements (N, F, 2) to the minimum of the cost between pixels, by paraboloids through six points.

    The cost is taken at the quarter of the first frame's pixels that weigh most, K of them.
    """
    weight, indices = subject.flatten(1).topk(subject[0].numel() // 4)  # (N, K)
    spots = pixel_grid(clips).flatten(2)[0].T[indices].transpose(1, 2).unsqueeze(2)  # (N, 2, 1, K)
    weight, value = weight.unsqueeze(1), clips[:, 0].flatten(1).gather(1, indices).unsqueeze(1)  # (N, 1, K)

    def cost(displaced: Tensor) -> Tensor:
        """Return the mean squared difference (N, F) of the spots from what lies displaced from them."""
        points = (spots[:, None] + displaced[..., None, None]).flatten(0, 1)
        found = sample(clips.flatten(0, 1).unsqueeze(1), points).flatten(1).unflatten(0, clips.shape[:2])
        seen = weight * inside(points, *clips.shape[-2:]).flatten(1).view_as(found)
        mean: Tensor = (seen * (found - value).square()).sum(dim=2) / seen.sum(dim=2).clamp_min(1e-20)
        return mean

    for reach in REFINEMENTS:
        offsets = reach * clips.new_tensor([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (1, 1)])
        costs = torch.stack([cost(displacement + offset) for offset in offsets])
        displacement = displacement + reach * _lowest_point(costs)
    return displacement


def _lowest_point(costs: Tensor) -> Tensor:
    """Return where the paraboloid through (0, 0), (-1, 0), (1, 0), (0, -1), (0, 1) and (1, 1) is least, within +-1/2.

    Where it has no minimum, x and y are taken apart: a slanted stroke has one long valley, which needs both.

    Args:
        costs: (6, ...), its values there.

    Returns:
        The point (..., 2).
    """
    middle, left, right, above, below, corner = costs
    slope_x, slope_y = (right - left) / 2, (below - above) / 2
    bend_x, bend_y = left - 2 * middle + right, above - 2 * middle + below
    twist = corner - right - below + middle
    determinant = bend_x * bend_y - twist**2
    bowl = (bend_x > 0) & (bend_y > 0) & (determinant > FLAT * bend_x * bend_y)
    safe = determinant.where(bowl, torch.ones_like(determinant))
    joint = torch.stack([twist * slope_y - bend_y * slope_x, twist * slope_x - bend_x * slope_y], dim=-1)
    apart = torch.stack([_vertex(left, middle, right), _vertex(above, middle, below)], dim=-1)
    point: Tensor = (joint / safe.unsqueeze(-1)).where(bowl.unsqueeze(-1), apart)
    return point.clamp(-0.5, 0.5)


def _best_displacements(clips: Tensor, spectra: tuple[Tensor, Tensor], subject: Tensor) -> Tensor:
    """Return the displacement (N, F, 2) of each frame, to a fraction of a pixel, from costs on the grid of pixels."""
    height, width = clips.shape[-2:]
    cost, contrast = _costs(clips, spectra, subject)
    # The displacement (2, 2H, 2W) that each cell of a padded correlation stands for.
    y = torch.fft.fftfreq(2 * height, 1 / (2 * height), device=clips.device, dtype=clips.dtype)
    x = torch.fft.fftfreq(2 * width, 1 / (2 * width), device=clips.device, dtype=clips.dtype)
    shift = torch.stack(torch.meshgrid(x, y, indexing="xy"))
    current = clips.new_zeros(len(clips), 2)
    found = [current]
    for frame in range(1, clips.shape[1]):
        away = (shift - current[:, :, None, None]).square().sum(dim=1) / (height**2 + width**2)
        current = _minimum(cost[:, frame] + NEARNESS * contrast * away, shift)
        found.append(current)
    return torch.stack(found, dim=1)


def _costs(clips: Tensor, spectra: tuple[Tensor, Tensor], subject: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squared difference (N, F, 2H, 2W) at each displacement, and the subject's contrast (N, 1, 1).

    What leaves the frame is charged as a flat field would be; too large a share of the subject may not leave.
    """
    size = (2 * clips.shape[-2], 2 * clips.shape[-1])
    first, mass = clips[:, 0], subject.sum(dim=(1, 2))[:, None, None]

    def spectrum(weights: Tensor) -> Tensor:
        transform: Tensor = torch.fft.rfft2(weights, s=size)
        return transform.conj()

    whole, weight = torch.fft.rfft2(torch.ones_like(first), s=size), spectrum(subject)
    fixed: Tensor = torch.fft.irfft2(spectrum(subject * first**2) * whole, s=size)
    overlap = torch.fft.irfft2(weight * whole, s=size)
    product = weight[:, None] * spectra[1] - 2 * spectrum(subject * first)[:, None] * spectra[0]
    varying = torch.fft.irfft2(product, s=size)
    share = subject / subject.sum(dim=(1, 2), keepdim=True)
    mean = (share * first).sum(dim=(1, 2), keepdim=True)
    contrast = (share * (first - mean).square()).sum(dim=(1, 2))[:, None, None] + NOISE
    fixed = (fixed + contrast * (mass - overlap)).masked_fill(overlap < LEAST_OVERLAP * mass, torch.inf)
    return (fixed[:, None] + varying) / mass[:, None], contrast


def _minimum(cost: Tensor, shift: Tensor) -> Tensor:
    """Return where a cost (N, 2H, 2W) on periodic axes is least, to a fraction of a pixel: (N, 2)."""
    height, width = cost.shape[-2:]
    flat = cost.flatten(1)
    lowest = flat.argmin(dim=-1)
    row, column = lowest // width, lowest % width

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        return flat.gather(1, (rows % height * width + columns % width).unsqueeze(-1)).squeeze(-1)

    middle = at(row, column)
    beside = (at(row, column - 1), at(row, column + 1)), (at(row - 1, column), at(row + 1, column))
    fraction = torch.stack([_vertex(low, middle, high) for low, high in beside], dim=-1)
    return shift.flatten(1).T[lowest] + fraction


def _vertex(low: Tensor, middle: Tensor, high: Tensor) -> Tensor:
    """Return the abscissa in [-1/2, 1/2] of the minimum of the parabola through (-1, low), (0, middle), (1, high)."""
    bend = low - 2 * middle + high
    known = bend.isfinite() & (bend > 0)
    vertex = torch.where(known, (low - high) / (2 * bend.where(known, torch.ones_like(bend))), torch.zeros_like(bend))
    return vertex.nan_to_num(0.0).clamp(-0.5, 0.5)


def _moving(clips: Tensor, displacement: Tensor) -> Tensor:
    """Return how surely each pixel of the first frame goes where the subject goes: (N, H, W)."""
    points = pixel_grid(clips) + displacement[:, 1:].flatten(0, 1)[..., None, None]
    later = clips[:, 1:]
    found = sample(later.flatten(0, 1).unsqueeze(1), points).view_as(later)
    seen = inside(points, *clips.shape[-2:]).view_as(later)
    sure = explained((found - clips[:, :1]).square(), (later - clips[:, :1]).square(), seen)
    return blur(sure, SPREAD) + LEAST
