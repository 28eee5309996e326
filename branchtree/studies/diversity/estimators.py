"""The squared maximum mean discrepancy (MMD^2) of two sets, as the usual estimators have it.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)          (arXiv 0805.2368)

KID is the unbiased estimate under the cubic kernel (arXiv 1801.01401). These estimators take all samples of a set to be
independent, as samples of one tree are not; see ``branchtree.studies.diversity.blocks`` for one that does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.studies.diversity.sums import PairSums, SelfSums


@dataclass(frozen=True)
class SetSums:
    """All sums of two sets x and y under one kernel."""

    within_x: PairSums
    within_y: PairSums
    between: PairSums
    self_x: SelfSums
    self_y: SelfSums


@dataclass(frozen=True)
class Kid:
    """Mean and standard deviation of the unbiased estimate over subsets of the samples."""

    mean: float
    std: float  # over subsets, with their number as divisor, as others report it
    subsets: int
    size: int


def unbiased(sums: SetSums, samples_x: int, samples_y: int) -> float:
    """The U-statistic: pairs of a sample with itself are left out. Below 0 about as often as above for equal laws."""
    pairs_x, pairs_y = samples_x * (samples_x - 1), samples_y * (samples_y - 1)
    within_x = (sums.within_x.groups.sum() - sums.self_x.groups.sum()) / pairs_x
    within_y = (sums.within_y.groups.sum() - sums.self_y.groups.sum()) / pairs_y
    return float(within_x + within_y - 2 * sums.between.groups.sum() / (samples_x * samples_y))


def biased(sums: SetSums, samples_x: int, samples_y: int) -> float:
    """The V-statistic over all pairs: the squared distance of the sets' mean embeddings, never below 0."""
    within_x, within_y = sums.within_x.groups.sum() / samples_x**2, sums.within_y.groups.sum() / samples_y**2
    return float(within_x + within_y - 2 * sums.between.groups.sum() / (samples_x * samples_y))


def kid(sums: SetSums, size: int) -> Kid | None:
    """KID over the subsets, of ``size`` samples each, that the sums were made with; None if there were none."""
    count = len(sums.between.subsets)
    if count == 0:
        return None
    values = _over_subsets(sums, size)
    return Kid(float(values.mean()), float(values.std(correction=0)), count, size)


def _over_subsets(sums: SetSums, size: int) -> Tensor:
    within_x = sums.within_x.subsets - sums.self_x.subsets
    within_y = sums.within_y.subsets - sums.self_y.subsets
    pairs = torch.tensor(size * (size - 1), dtype=torch.float64)
    return (within_x + within_y) / pairs - 2 * sums.between.subsets / size**2
