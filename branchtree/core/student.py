"""Student's t: quantiles, the probability of its tail, and estimates that are judged by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.segments import segment_mean


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t with ``freedom`` degrees of freedom, at a probability from 0.5 to below 1."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile of t at probability {probability} with {freedom} degrees of freedom")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        below = (1 + _central_probability(middle, freedom)) / 2 < probability
        low, high = (middle, high) if below else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _central_probability(angle: float, freedom: int) -> float:
    """Return P(|t| < tan(angle) sqrt(freedom)), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def student_tail(value: float, freedom: int) -> float:
    """Return the probability that Student's t with ``freedom`` degrees of freedom is above ``value``."""
    tail = (1 - _central_probability(math.atan(abs(value) / math.sqrt(freedom)), freedom)) / 2
    return tail if value >= 0 else 1 - tail


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated by least squares under normal errors."""

    value: float
    error: float  # its standard error
    freedom: int  # degrees of freedom of the error, at least 1

    def probability_at(self, bound: float) -> float:
        """Return how probable an estimate this far below ``bound`` is if the true number is ``bound`` or more.

        Without any error it is that of a coin that falls on the same side for every observation.
        """
        if self.error == 0:
            return 0.5 ** (self.freedom + 1) if self.value < bound else 1.0
        return student_tail((bound - self.value) / self.error, self.freedom)

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, self.error, self.freedom)


def change_of(values: Sequence[float | None]) -> Estimate | None:
    """Return the change from the first to the last of a series, along its line of least squares.

    A value that is None is left out; None where fewer than three are there.
    """
    known = [(float(i), value) for i, value in enumerate(values) if value is not None]
    if len(known) < 3:
        return None
    at, value = torch.tensor(known, dtype=torch.float64).unbind(1)
    return _slope(at, value, len(values) - 1, len(known) - 2)


def mean_of(values: Sequence[float]) -> Estimate | None:
    """Return the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std()) / math.sqrt(len(values)), len(values) - 1)


def difference_of(late: Sequence[float | None], early: Sequence[float | None]) -> Estimate | None:
    """Return how far the mean of independent values lies above that of others, whose variance may be another.

    The degrees of freedom are those of Welch (1947), rounded down. A value that is None is left out; None where fewer
    than two of either are there.
    """
    one, other = (mean_of([value for value in values if value is not None]) for values in (late, early))
    if one is None or other is None:
        return None
    variance = one.error**2 + other.error**2
    spread = one.error**4 / one.freedom + other.error**4 / other.freedom
    freedom = int(variance**2 / spread) if spread else one.freedom + other.freedom
    least = min(one.freedom, other.freedom)  # which the quotient misses by rounding where one error is 0
    return Estimate(one.value - other.value, math.sqrt(variance), max(freedom, least))


def contrast_of(values: Tensor, late: Tensor, stratum: Tensor, strata: int) -> Estimate | None:
    """Return how far late values lie above early ones of the same stratum.

    Args:
        values: (N,) float64.
        late: (N,) bool.
        stratum: (N,) int64, which of the ``strata`` each value belongs to.
        strata: How many there are.

    Returns:
        The coefficient of ``late`` beside an intercept for each stratum; None where no stratum has both kinds, or no
        degree of freedom is left.
    """
    kinds = late.double()
    centred = kinds - segment_mean(kinds, stratum, strata)[stratum]
    freedom = len(values) - len(stratum.unique()) - 1
    if freedom < 1 or not bool((centred != 0).any()):
        return None
    return _slope(centred, values - segment_mean(values, stratum, strata)[stratum], 1.0, freedom)


def _slope(at: Tensor, value: Tensor, length: float, freedom: int) -> Estimate:
    """Return ``length`` times the slope of the line of least squares through values (N,) at abscissas (N,)."""
    at, value = at - at.mean(), value - value.mean()
    squares = at.square().sum()
    slope = (at * value).sum() / squares
    residual = value - slope * at
    # Residuals below the rounding of the values are none.
    residual = torch.where(residual.abs() > 1e-12 * value.abs().max(), residual, torch.zeros_like(residual))
    error = (residual.square().sum() / freedom / squares).sqrt()
    return Estimate(length * float(slope), length * float(error), freedom)
