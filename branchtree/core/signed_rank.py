"""Wilcoxon's signed-rank test, which asks of paired differences only that they are symmetric where nothing happened."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MOST_EXACT = 100
"""Differences up to which probabilities are exact; the normal distribution of more has heavier tails, not lighter."""


def signed_rank_tail(differences: Sequence[float]) -> float:
    """Return the probability of ranks of positive differences that add up to no more, if both signs are as likely.

    Differences of 0 are left out, and those of the same size share the mean of their ranks. 1 where none is left.
    """
    values = torch.tensor([each for each in differences if each != 0], dtype=torch.float64)
    if not len(values):
        return 1.0
    _, index, counts = values.abs().unique(return_inverse=True, return_counts=True)
    doubled = (2 * counts.cumsum(0) - counts + 1)[index]  # twice the mean rank of each size, an integer
    positive, total = int(doubled[values > 0].sum()), int(doubled.sum())
    if len(values) > MOST_EXACT:
        deviation = float(doubled.double().square().sum().sqrt()) / 2
        return math.erfc((total / 2 - positive - 1) / deviation / math.sqrt(2)) / 2
    chance = torch.zeros(total + 1, dtype=torch.float64)  # of each sum of doubled ranks
    chance[0] = 1.0
    for rank in doubled.tolist():
        shifted = torch.cat([chance.new_zeros(rank), chance[:-rank]])
        chance = (chance + shifted) / 2
    return float(chance[: positive + 1].sum())
