"""How far the samples of one group lie from each other. Axis letters: G groups, K samples of a group, D numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DistanceSpread:
    """The mean over groups of a group's mean pairwise distance, and its standard error."""

    mean: float
    error: float
    groups: int


def pairwise_distance(samples: Tensor) -> Tensor:
    """Each group's mean over its pairs of the root mean square difference, (G,) float64, for samples (G, K, D).

    The root mean square over the D numbers, and not their Euclidean distance, so that sizes can be compared. NaN for
    groups of one sample, which have no pairs.
    """
    scale = math.sqrt(samples.shape[-1])
    # Group by group, by differences: the short cut over inner products loses small distances to rounding.
    return torch.stack([torch.pdist(group.flatten(1).double()).mean() / scale for group in samples])


def distance_spread(distances: Tensor) -> DistanceSpread | None:
    """What groups' distances (G,) come to; None if groups have no pairs."""
    if not bool(distances.isfinite().all()):
        return None
    error = float(distances.std() / math.sqrt(len(distances))) if len(distances) > 1 else math.nan
    return DistanceSpread(float(distances.mean()), error, len(distances))


def grouped(features: Tensor, size: int) -> Tensor:
    """Features (G * K, D), group after group, as (G, K, D)."""
    return features.reshape(-1, size, features.shape[1])
