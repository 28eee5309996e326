"""Sums, means and extremes over the members of groups, each member naming its group by index."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum of ``values`` (N,) in each of ``groups`` groups, ``group`` (N,) int64: (groups,)."""
    return torch.zeros(groups, dtype=values.dtype).index_add_(0, group, values)


def segment_count(group: Tensor, groups: int) -> Tensor:
    """Members in each group, (groups,) int64."""
    return torch.bincount(group, minlength=groups)


def segment_max(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Largest of ``values`` (N,) in each group; -inf in an empty one: (groups,)."""
    lowest = torch.full((groups,), -torch.inf, dtype=values.dtype)
    return lowest.scatter_reduce_(0, group, values, "amax")


def segment_mean(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mean of ``values`` (N,) in each group; 0 in an empty one: (groups,)."""
    return segment_sum(values, group, groups) / segment_count(group, groups).clamp_min(1)


def segment_std(values: Tensor, group: Tensor, groups: int, floor: Tensor | None = None) -> Tensor:
    """Sample standard deviation in each group: (groups,).

    0 in a group of fewer than two members, and in one whose spread is no more than ``floor`` (groups,): by default
    the rounding of sums of float64 numbers.
    """
    mean = segment_mean(values, group, groups)
    squares = segment_sum((values - mean[group]).square(), group, groups)
    std = (squares / (segment_count(group, groups) - 1).clamp_min(1)).sqrt()
    if floor is None:
        floor = 1e-12 * segment_size(values, group, groups)
    return torch.where(std > floor, std, torch.zeros_like(std))


def segment_size(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Largest magnitude in each group; 0 in an empty one: (groups,)."""
    return segment_max(values.abs(), group, groups).clamp_min(0)


def over_spread(centred: Tensor, std: Tensor, eps: float = 0.0) -> Tensor:
    """centred / (std + eps), and 0 where there is no spread."""
    return torch.where(std > 0, centred / (std + eps), torch.zeros_like(centred))


def segment_standardised(
    values: Tensor, group: Tensor, groups: int, eps: float = 0.0, floor: Tensor | None = None
) -> Tensor:
    """``values`` (N,) less their group's mean, over its sample deviation + eps; 0 in a group without spread: (N,).

    ``floor`` is that of ``segment_std``.
    """
    centred = values - segment_mean(values, group, groups)[group]
    return over_spread(centred, segment_std(values, group, groups, floor)[group], eps)
