"""Weights of a tree's steps in the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from branchtree.core.gaussian import GaussianTransition
from branchtree.core.rollout import Sampler

StepWeighting = Callable[[Sampler, Tensor, Tensor], Tensor]
"""(sampler, depth (F,) of each step, active (F,) as a kernel takes it) -> weight of each step (F,), on the CPU."""


def noise_weights(sampler: Sampler, depth: Tensor, active: Tensor) -> Tensor:
    """TempFlow-GRPO's weights; see ``Sampler.noise_weights``."""
    return sampler.noise_weights()[depth]


def gradient_weights(sampler: Sampler, depth: Tensor, active: Tensor) -> Tensor:
    """Flash-GRPO's weights (arXiv 2605.15980): by them a step's gradient does not depend on its noise level.

    The gradient of a log-density grows with |d mean / d prediction| / s, s being the deviation of the step's noise. The
    weight is its inverse, over the mean of all steps that can be stochastic. For the flow's SDE with noise level g,
    s = g sqrt(dt), that is 1 / (sqrt(dt) / g + g sqrt(dt) (1 - sigma) / (2 sigma)). Raises ValueError for a kernel that
    is not Gaussian.
    """
    grid = torch.arange(len(sampler.sigmas) - 2)
    typical = _noise_over_slope(sampler, grid, torch.ones(len(grid), dtype=torch.bool)).mean()
    return _noise_over_slope(sampler, depth, active) / typical


def _noise_over_slope(sampler: Sampler, depth: Tensor, active: Tensor) -> Tensor:
    """Return s / |d mean / d prediction| of some steps, (F,); means are linear in the prediction."""
    nothing = torch.zeros(len(depth), 1)
    still, moved = (sampler.transition(nothing, prediction, depth, active) for prediction in (nothing, nothing + 1))
    if not (isinstance(still, GaussianTransition) and isinstance(moved, GaussianTransition)):
        raise ValueError(f"{type(still).__name__} has no mean and deviation to weigh steps by")
    return still.std.flatten() / (moved.mean - still.mean).flatten().abs()
