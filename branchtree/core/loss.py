"""The clipped policy-gradient objective over a tree's edges."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EdgeLoss = Callable[[Tensor, Tensor], Tensor]
"""(ratio (E,), advantage (E,)) -> loss (E,), differentiable in the ratio."""


def probability_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """rho = p_new / p_old of each edge, (E,)."""
    return (log_prob - old_log_prob).exp()


def clipped_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(rho * A, clip(rho, 1 - eps, 1 + eps) * A) of each edge, (E,) (PPO, arXiv 1707.06347, eq. 7)."""
    if ratio.shape != advantage.shape:
        raise ValueError(f"{tuple(ratio.shape)} ratios and {tuple(advantage.shape)} advantages")
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_away(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return which edges the clip silences, (E,) bool: those whose ratio has gone past it in the favoured direction."""
    return ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))
