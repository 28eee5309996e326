"""Kernels that two sets of features are compared by. Axis letters: A, B samples of two sets, N samples, D features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BANDWIDTH_SAMPLES = 2000
"""Samples that the median heuristic looks at: two million pairs."""


class FeatureKernel(Protocol):
    """A positive definite function of two feature vectors, worked out from their inner products."""

    @property
    def name(self) -> str:
        """What results call it."""

    def values(self, dots: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """k(x, y) from inner products ``dots`` and squared norms ``left`` and ``right``, which broadcast."""


@dataclass(frozen=True)
class CubicKernel:
    """(x.y / D + 1)^3, the kernel of KID (arXiv 1801.01401)."""

    dimension: int

    @property
    def name(self) -> str:
        """See FeatureKernel."""
        return "cubic"

    def values(self, dots: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """See FeatureKernel."""
        base = dots / self.dimension + 1
        return base * base * base


@dataclass(frozen=True)
class RbfKernel:
    """exp(-|x - y|^2 / (2 h^2)) with bandwidth h."""

    bandwidth: float

    @property
    def name(self) -> str:
        """See FeatureKernel."""
        return "rbf"

    def values(self, dots: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """See FeatureKernel."""
        # Rounding can leave the squared distance of a sample to itself just below 0.
        squares = (left + right - 2 * dots).clamp_min(0)
        return torch.exp(squares / (-2 * self.bandwidth**2))


def median_bandwidth(sets: Sequence[Tensor], seed: int = 0) -> float:
    """The median distance between samples of all sets (N, D) together: the usual bandwidth (arXiv 1205.2664, sec. 8).

    Of more than BANDWIDTH_SAMPLES samples, that many are drawn. Where the median is 0, because most samples are equal,
    the mean distance is taken, and 1 where all are.
    """
    pooled = torch.cat(list(sets)).double()
    if len(pooled) > BANDWIDTH_SAMPLES:
        drawn = torch.randperm(len(pooled), generator=torch.Generator().manual_seed(seed))[:BANDWIDTH_SAMPLES]
        pooled = pooled[drawn]
    distances = torch.pdist(pooled)
    return float(distances.median()) or float(distances.mean()) or 1.0
