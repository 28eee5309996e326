"""Means and spreads over seeds, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from branchtree.studies.common.student import student_quantile

CONFIDENCE = 0.95


@dataclass(frozen=True)
class SeedSpread:
    """Mean and sample standard deviation."""

    mean: float
    std: float | None  # of one value there is none
    count: int


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its 95% interval by Student's t."""

    mean: float
    low: float | None  # of one pair there is no interval
    high: float | None
    pairs: int


def seed_spread(values: Sequence[float]) -> SeedSpread | None:
    """Mean and sample standard deviation (n - 1) of some values; None of none."""
    if not values:
        return None
    return SeedSpread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """``values`` minus ``reference`` over the seeds that both have; None if they share none.

    The interval is mean +- t(n - 1) s / sqrt(n), s being the standard deviation of the differences.
    """
    found = seed_spread([values[seed] - reference[seed] for seed in values if seed in reference])
    if found is None:
        return None
    if found.std is None:
        return Difference(found.mean, None, None, found.count)
    half = student_quantile((1 + CONFIDENCE) / 2, found.count - 1) * found.std / math.sqrt(found.count)
    return Difference(found.mean, found.mean - half, found.mean + half, found.count)
