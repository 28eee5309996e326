"""A study's figures: how far two sets lie apart in a feature space, and how far the samples of one group do.

Axis letters: G groups, K samples of a group, D numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.studies.diversity.blocks import BlockInterval, Groups, block_mmd
from branchtree.studies.diversity.mmd import (
    Kid,
    SampleSet,
    SetSums,
    biased,
    cubic_kernel,
    draw_subsets,
    kid,
    median_bandwidth,
    pair_sums,
    rbf_kernel,
    self_sums,
    unbiased,
)

SUBSETS, SUBSET_SIZE = 100, 1000
"""Subsets, and samples in each, that KID is commonly reported with."""


@dataclass(frozen=True)
class Discrepancy:
    """How far two sets lie apart, by one kernel in one feature space."""

    features: str  # label of the space
    first: str  # name of a set
    second: str
    kernel: str
    bandwidth: float | None  # of an RBF kernel
    kid: Kid | None  # of the cubic kernel, from sets larger than one subset
    unbiased: float
    biased: float
    groups: BlockInterval  # of pairs of different groups alone


@dataclass(frozen=True)
class DistanceSpread:
    """The mean over groups of a group's mean pairwise distance, and its standard error."""

    mean: float
    error: float
    groups: int


def compare_sets(
    label: str, sets: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]], prompt: Tensor, size: int, seed: int
) -> list[Discrepancy]:
    """Compare pairs of sets.

    Args:
        label: The feature space's.
        sets: Features (G * K, D) by the set's name, group after group.
        pairs: Names of the sets to compare.
        prompt: The prompt of each group, (G,) int64.
        size: K, the samples of a group.
        seed: What the subsets, the bandwidth's samples and the bootstrap are drawn by.
    """
    count, group = len(prompt) * size, torch.arange(len(prompt)).repeat_interleave(size)
    features = list(sets.values())
    kernels = [cubic_kernel(features[0].shape[1]), rbf_kernel(median_bandwidth(features, seed))]
    samples = {
        name: SampleSet(
            each, group, draw_subsets(count, SUBSET_SIZE, SUBSETS, seed + index) if count > SUBSET_SIZE else None
        )
        for index, (name, each) in enumerate(sets.items())
    }
    within = {name: (pair_sums(one, one, kernels), self_sums(one, kernels)) for name, one in samples.items()}
    found: list[Discrepancy] = []
    for first, second in pairs:
        between = pair_sums(samples[first], samples[second], kernels)
        for index, kernel in enumerate(kernels):
            (x, self_x), (y, self_y) = ((pair[index], own[index]) for pair, own in (within[first], within[second]))
            sums = SetSums(x, y, between[index], self_x, self_y)
            mean_x, mean_y, mean_between = (each.groups / size**2 for each in (x, y, between[index]))
            found.append(
                Discrepancy(
                    features=label,
                    first=first,
                    second=second,
                    kernel=kernel.name,
                    bandwidth=kernel.bandwidth,
                    kid=kid(sums, SUBSET_SIZE) if kernel.name == "cubic" else None,
                    unbiased=unbiased(sums, count, count),
                    biased=biased(sums, count, count),
                    groups=block_mmd(mean_x, mean_y, mean_between, Groups(prompt, prompt), seed),
                )
            )
    return found


def pairwise_distance(samples: Tensor) -> Tensor:
    """Return each group's mean over its pairs of the root mean square difference, (G,) float64, of samples (G, K, D).

    The root mean square over the D numbers, and not their Euclidean distance, so that sizes can be compared. NaN for
    groups of one sample, which have no pairs.
    """
    scale = math.sqrt(samples.shape[-1])
    # Group by group, by differences: the short cut over inner products loses small distances to rounding.
    return torch.stack([torch.pdist(group.flatten(1).double()).mean() / scale for group in samples])


def distance_spread(distances: Tensor) -> DistanceSpread | None:
    """Return the spread of groups' distances (G,); None if groups have no pairs."""
    if not bool(distances.isfinite().all()):
        return None
    error = float(distances.std() / math.sqrt(len(distances))) if len(distances) > 1 else math.nan
    return DistanceSpread(float(distances.mean()), error, len(distances))
