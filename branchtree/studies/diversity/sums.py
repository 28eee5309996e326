"""One exact pass over all pairs of two sets, from which every estimator here is made.

Axis letters: N samples, D features, G groups, S subsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from branchtree.core.rollout import chunks
from branchtree.studies.diversity.kernels import FeatureKernel

ROWS = 512
"""Samples whose kernel values with all others are in memory at once."""


@dataclass(frozen=True)
class SampleSet:
    """Features of samples, the group that each belongs to, and subsets of them."""

    features: Tensor  # (N, D)
    group: Tensor  # (N,) int64, from 0 to G - 1
    subsets: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))  # (S, size) sample indices

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.group.shape != self.features.shape[:1]:
            raise ValueError(f"features (N, D) need groups (N,), not {tuple(self.features.shape)}, {self.group.shape}")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def groups(self) -> int:
        """G."""
        return int(self.group.max()) + 1

    @property
    def members(self) -> Tensor:
        """Which samples each subset holds, (S, N) float64 of 0 and 1."""
        inside = torch.zeros(len(self.subsets), len(self), dtype=torch.float64)
        return inside.scatter_(1, self.subsets, 1.0) if len(self.subsets) else inside


@dataclass(frozen=True)
class PairSums:
    """Sums of k(x, y) over the pairs of two sets, float64."""

    groups: Tensor  # (G_x, G_y): over the pairs of two groups
    subsets: Tensor  # (S,): over the pairs of subset s of one set and subset s of the other


@dataclass(frozen=True)
class SelfSums:
    """Sums of k(x, x) over one set, float64."""

    groups: Tensor  # (G,)
    subsets: Tensor  # (S,)


def pair_sums(first: SampleSet, second: SampleSet, kernels: Sequence[FeatureKernel]) -> list[PairSums]:
    """The sums for each kernel, accumulated in float64. Raises ValueError if the sets have different features."""
    if first.features.shape[1] != second.features.shape[1]:
        raise ValueError(f"{first.features.shape[1]} features cannot be compared with {second.features.shape[1]}")
    right, members = second.features.double(), second.members
    squares = right.square().sum(dim=1)
    groups = [torch.zeros(first.groups, second.groups, dtype=torch.float64) for _ in kernels]
    # What each sample of the first set adds up to with each subset of the second.
    with_subset = [torch.empty(len(first), len(members), dtype=torch.float64) for _ in kernels]
    for rows in chunks(len(first), ROWS):
        span = slice(rows.start, rows.stop)
        left = first.features[span].double()
        dots, norms = left @ right.T, left.square().sum(dim=1, keepdim=True)
        for place, kernel in enumerate(kernels):
            values = kernel.values(dots, norms, squares)
            by_group = torch.zeros(len(rows), second.groups, dtype=torch.float64).index_add_(1, second.group, values)
            groups[place].index_add_(0, first.group[span], by_group)
            with_subset[place][span] = values @ members.T
    chosen = first.members
    return [PairSums(total, (chosen * column.T).sum(dim=1)) for total, column in zip(groups, with_subset, strict=True)]


def self_sums(samples: SampleSet, kernels: Sequence[FeatureKernel]) -> list[SelfSums]:
    """The sums for each kernel."""
    squares = samples.features.double().square().sum(dim=1)
    values = [kernel.values(squares, squares, squares) for kernel in kernels]
    empty = torch.zeros(samples.groups, dtype=torch.float64)
    return [SelfSums(empty.index_add(0, samples.group, each), samples.members @ each) for each in values]


def draw_subsets(samples: int, size: int, count: int, seed: int) -> Tensor:
    """``count`` subsets of ``size`` different samples, (count, size) int64, the same for the same seed."""
    source = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(samples, generator=source)[:size] for _ in range(count)])
