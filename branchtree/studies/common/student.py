"""Quantiles of Student's t distribution."""

from __future__ import annotations

import math


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with a whole number of degrees of freedom, for probabilities from 0.5 to below 1."""
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"no quantile of t at probability {probability} with {freedom} degrees of freedom")
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        below = (1 + _central_probability(middle, freedom)) / 2 < probability
        low, high = (middle, high) if below else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _central_probability(angle: float, freedom: int) -> float:
    """P(|t| < tan(angle) sqrt(freedom)), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
