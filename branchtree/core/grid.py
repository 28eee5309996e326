"""Time grids: T + 1 noise levels sigma_0 > ... > sigma_T = 0 for T transitions."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move a grid towards high noise: sigma' = s * sigma / (1 + (s - 1) * sigma).

    The resolution-dependent time shift of Stable Diffusion 3 (arXiv 2403.03206, eq. 23); s = 1 changes nothing.
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive, not {shift}")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """A linear grid from 1 to 0, shifted: (steps + 1,) float32 on the CPU."""
    if steps < 1:
        raise ValueError(f"a grid needs at least one step, not {steps}")
    linear = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_sigmas(linear, shift).to(torch.float32)


def check_grid(sigmas: Tensor) -> None:
    """Raise ValueError unless the grid falls strictly from at most 1 to exactly 0."""
    if sigmas.ndim != 1 or sigmas.numel() < 2:
        raise ValueError(f"a time grid is a vector of at least two noise levels, not {tuple(sigmas.shape)}")
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError("noise levels must fall strictly")
    if float(sigmas[0]) > 1 or float(sigmas[-1]) != 0:
        raise ValueError(f"noise levels run from at most 1 to 0, not {float(sigmas[0])} to {float(sigmas[-1])}")
