"""One reward's figures: of a model alone, or of two models sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.studies.common.intervals import LEVEL, clustered_interval
from branchtree.training.evaluation import Figure, figure_of


@dataclass(frozen=True)
class Interval:
    """Where a mean over all such prompts lies, with probability ``level``."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class RewardComparison:
    """One reward's figures.

    Both models make a sample of each prompt from each noise, and such a pair counts if both samples are valid. Of a
    model alone, each valid sample counts, ``trained`` to ``tied`` are None, and the interval is that of its mean.
    """

    base: Figure
    trained: Figure | None
    difference: float | None  # trained minus base, mean over the pairs that count; None if there are none
    interval: Interval | None  # of the difference; None if what counts comes from fewer than 2 prompts
    improved: float | None  # share of pairs whose value rose
    tied: float | None  # share of pairs whose value stayed the same
    counted: int  # pairs, or samples of a model alone
    left_out: int  # those that are not valid
    prompts: int  # that have one that counts


def compare_scores(
    base: Scores, trained: Scores | None, prompts: Sequence[int], seed: int, level: float = LEVEL
) -> RewardComparison:
    """Compare two models' scores of S samples, the same prompts and noises; ``prompts`` says of which prompt each is.

    ``seed`` addresses the resamples of the interval.
    """
    valid = base.valid if trained is None else base.valid & trained.valid
    values = base.values.double() if trained is None else trained.values.double() - base.values.double()
    values = values[valid]  # a value that is not valid may be anything
    clusters = torch.tensor(prompts, dtype=torch.int64)[valid]
    pairs = None if trained is None or not values.numel() else values
    return RewardComparison(
        base=figure_of(base),
        trained=None if trained is None else figure_of(trained),
        difference=None if pairs is None else float(pairs.mean()),
        interval=_interval(values, clusters, seed, level),
        improved=None if pairs is None else float((pairs > 0).double().mean()),
        tied=None if pairs is None else float((pairs == 0).double().mean()),
        counted=values.numel(),
        left_out=int((~valid).sum()),
        prompts=len(clusters.unique()),
    )


def _interval(values: Tensor, clusters: Tensor, seed: int, level: float) -> Interval | None:
    """Return the interval of the mean of S values; their prompts are clusters, and one without a value is left out."""
    present, member = clusters.unique(return_inverse=True)
    if len(present) < 2:
        return None
    zeros = torch.zeros(len(present), dtype=torch.float64)
    sums, counts = zeros.index_add(0, member, values), zeros.index_add(0, member, torch.ones_like(values))
    low, high = clustered_interval(sums, counts, seed, level)
    return Interval(float(low), float(high), level)
