"""The squared maximum mean discrepancy (MMD^2) of two sets of features, from one exact pass over all their pairs.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)          (arXiv 0805.2368)

KID is the unbiased estimate under the cubic kernel (arXiv 1801.01401). These estimators take all samples of a set to be
independent, as samples of one tree are not; see ``branchtree.studies.diversity.blocks`` for one that does not.
Axis letters: N samples, D features, G groups, S subsets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.rollout import chunks

BANDWIDTH_SAMPLES = 2000
"""Samples that the median heuristic looks at: two million pairs."""
ROWS = 512
"""Samples whose kernel values with all others are in memory at once."""


@dataclass(frozen=True)
class FeatureKernel:
    """A positive definite function k of two feature vectors, worked out from their inner products."""

    name: str
    values: Callable[[Tensor, Tensor, Tensor], Tensor]  # of inner products and both squared norms, which broadcast
    bandwidth: float | None = None


def cubic_kernel(dimension: int) -> FeatureKernel:
    """Return (x.y / D + 1)^3, the kernel of KID (arXiv 1801.01401)."""

    def values(dots: Tensor, left: Tensor, right: Tensor) -> Tensor:
        base = dots / dimension + 1
        return base * base * base

    return FeatureKernel("cubic", values)


def rbf_kernel(bandwidth: float) -> FeatureKernel:
    """Return exp(-|x - y|^2 / (2 h^2)) with bandwidth h."""

    def values(dots: Tensor, left: Tensor, right: Tensor) -> Tensor:
        # Rounding can leave the squared distance of a sample to itself just below 0.
        squares = (left + right - 2 * dots).clamp_min(0)
        return torch.exp(squares / (-2 * bandwidth**2))

    return FeatureKernel("rbf", values, bandwidth)


def median_bandwidth(sets: Sequence[Tensor], seed: int = 0) -> float:
    """Return the median distance between samples of all sets (N, D): the usual bandwidth (arXiv 1205.2664, sec. 8).

    Of more than BANDWIDTH_SAMPLES samples, that many are drawn. Where the median is 0, because most samples are equal,
    the mean distance is taken, and 1 where all are.
    """
    pooled = torch.cat(list(sets)).double()
    if len(pooled) > BANDWIDTH_SAMPLES:
        drawn = torch.randperm(len(pooled), generator=torch.Generator().manual_seed(seed))[:BANDWIDTH_SAMPLES]
        pooled = pooled[drawn]
    distances = torch.pdist(pooled)
    return float(distances.median()) or float(distances.mean()) or 1.0


@dataclass(frozen=True)
class SampleSet:
    """Features of samples, the group that each belongs to, and subsets of them."""

    features: Tensor  # (N, D)
    group: Tensor  # (N,) int64, from 0 to G - 1
    subsets: Tensor | None = None  # (S, size) sample indices

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
        if self.subsets is None:
            return torch.zeros(0, len(self), dtype=torch.float64)
        return torch.zeros(len(self.subsets), len(self), dtype=torch.float64).scatter_(1, self.subsets, 1.0)


@dataclass(frozen=True)
class KernelSums:
    """Sums of kernel values, float64: k(x, y) over the pairs of two sets, or k(x, x) over one set."""

    groups: Tensor  # (G_x, G_y): over the pairs of two groups; (G,) of one set
    subsets: Tensor  # (S,): over the pairs of subset s of one set and subset s of the other, or over subset s


@dataclass(frozen=True)
class SetSums:
    """All sums of two sets x and y under one kernel."""

    within_x: KernelSums
    within_y: KernelSums
    between: KernelSums
    self_x: KernelSums
    self_y: KernelSums


def pair_sums(first: SampleSet, second: SampleSet, kernels: Sequence[FeatureKernel]) -> list[KernelSums]:
    """Return the sums over pairs for each kernel. Raises ValueError if the sets have different features."""
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
        for kernel, total, column in zip(kernels, groups, with_subset, strict=True):
            values = kernel.values(dots, norms, squares)
            by_group = torch.zeros(len(rows), second.groups, dtype=torch.float64).index_add_(1, second.group, values)
            total.index_add_(0, first.group[span], by_group)
            column[span] = values @ members.T
    chosen = first.members
    return [
        KernelSums(total, (chosen * column.T).sum(dim=1)) for total, column in zip(groups, with_subset, strict=True)
    ]


def self_sums(samples: SampleSet, kernels: Sequence[FeatureKernel]) -> list[KernelSums]:
    """Return the sums over samples with themselves for each kernel."""
    squares = samples.features.double().square().sum(dim=1)
    values = [kernel.values(squares, squares, squares) for kernel in kernels]
    empty = torch.zeros(samples.groups, dtype=torch.float64)
    return [KernelSums(empty.index_add(0, samples.group, each), samples.members @ each) for each in values]


def draw_subsets(samples: int, size: int, count: int, seed: int) -> Tensor:
    """Return ``count`` subsets of ``size`` different samples, (count, size) int64, the same for the same seed."""
    source = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(samples, generator=source)[:size] for _ in range(count)])


def unbiased(sums: SetSums, samples_x: int, samples_y: int) -> float:
    """Return the U-statistic, without pairs of a sample with itself: as often below 0 as above for equal laws."""
    pairs_x, pairs_y = samples_x * (samples_x - 1), samples_y * (samples_y - 1)
    within_x = (sums.within_x.groups.sum() - sums.self_x.groups.sum()) / pairs_x
    within_y = (sums.within_y.groups.sum() - sums.self_y.groups.sum()) / pairs_y
    return float(within_x + within_y - 2 * sums.between.groups.sum() / (samples_x * samples_y))


def biased(sums: SetSums, samples_x: int, samples_y: int) -> float:
    """Return the V-statistic over all pairs: the squared distance of the sets' mean embeddings, never below 0."""
    within_x, within_y = sums.within_x.groups.sum() / samples_x**2, sums.within_y.groups.sum() / samples_y**2
    return float(within_x + within_y - 2 * sums.between.groups.sum() / (samples_x * samples_y))


@dataclass(frozen=True)
class Kid:
    """Mean and standard deviation of the unbiased estimate over subsets of the samples."""

    mean: float
    std: float  # over subsets, with their number as divisor, as others report it
    subsets: int
    size: int


def kid(sums: SetSums, size: int) -> Kid | None:
    """Return KID over the subsets, of ``size`` samples each, that the sums were made with; None without any."""
    count = len(sums.between.subsets)
    if count == 0:
        return None
    within = sums.within_x.subsets - sums.self_x.subsets + (sums.within_y.subsets - sums.self_y.subsets)
    values = within / (size * (size - 1)) - 2 * sums.between.subsets / size**2
    return Kid(float(values.mean()), float(values.std(correction=0)), count, size)
