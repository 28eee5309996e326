"""Two sets compared in one feature space, by every estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.studies.diversity.blocks import BlockInterval, Groups, block_mmd
from branchtree.studies.diversity.estimators import Kid, SetSums, biased, kid, unbiased
from branchtree.studies.diversity.kernels import CubicKernel, FeatureKernel, RbfKernel, median_bandwidth
from branchtree.studies.diversity.sums import SampleSet, draw_subsets, pair_sums, self_sums

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


def compare_sets(
    label: str, sets: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]], prompt: Tensor, size: int, seed: int
) -> list[Discrepancy]:
    """Compare pairs of sets.

    Args:
        label: Of the feature space.
        sets: Features (G * K, D) by the set's name, group after group.
        pairs: Names of the sets to compare.
        prompt: The prompt of each group, (G,) int64.
        size: K, the samples of a group.
        seed: Of the subsets, the bandwidth's samples and the bootstrap.
    """
    count = len(prompt) * size
    kernels: list[FeatureKernel] = [
        CubicKernel(next(iter(sets.values())).shape[1]),
        RbfKernel(median_bandwidth(list(sets.values()), seed)),
    ]
    group = torch.arange(len(prompt)).repeat_interleave(size)
    chosen = {
        name: draw_subsets(count, SUBSET_SIZE, SUBSETS, seed + place) if count > SUBSET_SIZE else None
        for place, name in enumerate(sets)
    }
    samples = {name: SampleSet(features, group, *_given(chosen[name])) for name, features in sets.items()}
    within = {name: (pair_sums(one, one, kernels), self_sums(one, kernels)) for name, one in samples.items()}
    found: list[Discrepancy] = []
    for first, second in pairs:
        between = pair_sums(samples[first], samples[second], kernels)
        for place, kernel in enumerate(kernels):
            (x, own_x), (y, own_y) = ((pair[place], own[place]) for pair, own in (within[first], within[second]))
            sums = SetSums(x, y, between[place], own_x, own_y)
            found.append(_discrepancy(label, first, second, kernel, sums, prompt, size, seed))
    return found


def _given(subsets: Tensor | None) -> list[Tensor]:
    return [] if subsets is None else [subsets]


def _discrepancy(
    label: str,
    first: str,
    second: str,
    kernel: FeatureKernel,
    sums: SetSums,
    prompt: Tensor,
    size: int,
    seed: int,
) -> Discrepancy:
    count = len(prompt) * size
    within_x, within_y, between = (part.groups / size**2 for part in (sums.within_x, sums.within_y, sums.between))
    return Discrepancy(
        features=label,
        first=first,
        second=second,
        kernel=kernel.name,
        bandwidth=kernel.bandwidth if isinstance(kernel, RbfKernel) else None,
        kid=kid(sums, SUBSET_SIZE) if isinstance(kernel, CubicKernel) else None,
        unbiased=unbiased(sums, count, count),
        biased=biased(sums, count, count),
        groups=block_mmd(within_x, within_y, between, Groups(prompt, prompt), seed),
    )
