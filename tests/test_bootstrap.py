"""The interval of an evaluation: how often it covers the truth, by simulation, and what it is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from branchtree.studies.common.intervals import clustered_interval

SETS = 1000
"""Simulated data sets of a case. Of an interval that covers with probability 0.95, fewer than 926 of them are covered
with probability 4e-4, and more than 971 likewise (binomial)."""
LEAST, MOST = 926, 971
WIDE = 992  # where heavy tails or very few prompts make Student's t wider than it need be, and this with it
RESAMPLES = 1000

Draw = Callable[[tuple[int, int, int], torch.Generator], Tensor]
"""(data sets, prompts, noises) -> paired differences of that shape whose true mean is 0."""


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def exponential(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.empty(*shape, dtype=torch.float64).exponential_(generator=generator) - 1


def correlated(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Nine tenths of the variance lie between prompts."""
    sets, prompts, _ = shape
    between, within = normal(sets, prompts, 1, generator=generator), normal(*shape, generator=generator)
    return math.sqrt(0.9) * between + math.sqrt(0.1) * within


def skewed(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Prompts whose effects are exponential: a few gain much, most lose a little."""
    sets, prompts, _ = shape
    between, within = exponential(sets, prompts, 1, generator=generator), exponential(*shape, generator=generator)
    return math.sqrt(0.8) * between + math.sqrt(0.2) * within


def base_against_base(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Two models that are the same, from other noises: skewed rewards about a mean of each prompt's own."""
    sets, prompts, _ = shape
    mean = normal(sets, prompts, 1, generator=generator)
    first, second = (exponential(*shape, generator=generator) * mean.exp() for _ in range(2))
    return (mean + first) - (mean + second)


def accuracies(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """The same, with rewards 0 and 1 of prompts that differ in how hard they are: differences -1, 0 and 1."""
    sets, prompts, _ = shape
    chance = torch.rand(sets, prompts, 1, generator=generator, dtype=torch.float64)
    first, second = (torch.rand(*shape, generator=generator, dtype=torch.float64) < chance for _ in range(2))
    return first.double() - second.double()


def totals(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each prompt's sum and number; a tenth of the samples, never the first, are not valid."""
    valid = torch.rand(values.shape, generator=generator) < 0.9
    valid[..., 0] = True
    return (values * valid).sum(-1), valid.sum(-1)


def covered(draw: Draw, prompts: int, noises: int, effect: float = 0.0) -> int:
    """In how many of SETS data sets, all other and of a fixed seed, the interval holds the true mean."""
    source = torch.Generator().manual_seed(prompts)
    sums, counts = totals(draw((SETS, prompts, noises), source) + effect, source)
    low, high = clustered_interval(sums, counts, seed=7, resamples=RESAMPLES)
    return int(((low <= effect) & (effect <= high)).sum())


@pytest.mark.parametrize(
    ("draw", "sizes", "most"),
    [
        (correlated, (30, 16), MOST),
        (correlated, (10, 4), MOST),
        (correlated, (5, 4), WIDE),
        (accuracies, (30, 16), MOST),
        (accuracies, (10, 4), MOST),
        (accuracies, (5, 4), WIDE),
        (base_against_base, (30, 16), WIDE),
        (base_against_base, (10, 4), WIDE),
        (base_against_base, (5, 4), WIDE),
    ],
)
def test_a_planted_null_is_covered_95_times_in_100(draw: Draw, sizes: tuple[int, int], most: int) -> None:
    assert LEAST <= covered(draw, *sizes) <= most


@pytest.mark.parametrize("sizes", [(30, 16), (10, 4)], ids=str)
def test_skewed_prompts_with_an_effect_are_covered_95_times_in_100(sizes: tuple[int, int]) -> None:
    assert LEAST <= covered(skewed, *sizes, effect=0.7) <= MOST


def test_the_plain_percentile_interval_would_not_do() -> None:
    """Of 10 prompts it covers 90 times in 100: the reason for the studentised one. Drawn here by itself."""
    source = torch.Generator().manual_seed(10)
    sums, counts = totals(correlated((SETS, 10, 4), source), source)
    drawn = torch.randint(10, (RESAMPLES, 10), generator=source)
    means = sums[:, drawn].sum(-1) / counts[:, drawn].sum(-1)
    low, high = means.quantile(0.025, dim=-1), means.quantile(0.975, dim=-1)
    assert int(((low <= 0) & (high >= 0)).sum()) < LEAST


def test_an_interval_of_the_default_resamples_is_that_of_every_resample() -> None:
    """With 5 prompts all 5 ** 5 resamples can be listed: the exact studentised quantiles, which drawing approaches."""
    sums = torch.tensor([1.0, 4.0, -2.0, 12.0, 3.0], dtype=torch.float64)
    counts = torch.tensor([2.0, 3.0, 1.0, 4.0, 2.0], dtype=torch.float64)
    mean = float(sums.sum() / counts.sum())

    def error(chosen: list[int]) -> tuple[float, float]:
        here = sum(float(sums[g]) for g in chosen) / sum(float(counts[g]) for g in chosen)
        squares = sum((float(sums[g]) - here * float(counts[g])) ** 2 for g in chosen)
        return here, math.sqrt(squares * 5 / 4) / sum(float(counts[g]) for g in chosen)

    ratios = []
    for chosen in itertools.product(range(5), repeat=5):
        here, own = error(list(chosen))
        if own > 1e-9:
            ratios.append((here - mean) / own)
    spread, least = error(list(range(5)))[1], float(stats.t.ppf(0.9, 4))
    ends = torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.9, 0.1], dtype=torch.float64))
    expected = [mean - max(float(ends[0]), least) * spread, mean - min(float(ends[1]), -least) * spread]
    low, high = clustered_interval(sums, counts, seed=3, level=0.8)
    assert [float(low), float(high)] == pytest.approx(expected, abs=0.03 * (expected[1] - expected[0]))
    assert float(ends[0]) > least or float(ends[1]) < -least  # the bootstrap says more than Student here


def test_two_prompts_have_students_interval() -> None:
    """Resamples of two prompts are the data again, or one prompt twice, which says nothing but for rounding."""
    means = normal(50, 2, generator=torch.Generator().manual_seed(2))
    low, high = clustered_interval(means * 3, torch.full((50, 2), 3), seed=1)
    centre, error = means.mean(-1), (means[:, 0] - means[:, 1]).abs() / 2
    reach = float(stats.t.ppf(0.975, 1)) * error
    assert low.tolist() == pytest.approx((centre - reach).tolist())
    assert high.tolist() == pytest.approx((centre + reach).tolist())


def test_values_that_are_all_one_have_an_interval_of_no_width() -> None:
    low, high = clustered_interval(torch.full((6,), 0.3) * 4, torch.full((6,), 4), seed=1)
    assert float(low) == pytest.approx(0.3) == float(high)
    low, high = clustered_interval(torch.zeros(6), torch.full((6,), 4), seed=1)
    assert (float(low), float(high)) == (0.0, 0.0)


def test_one_prompt_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        clustered_interval(torch.ones(1), torch.ones(1), seed=1)


def test_an_interval_moves_and_stretches_with_the_values() -> None:
    source = torch.Generator().manual_seed(1)
    values = skewed((1, 12, 3), source)[0]
    counts = torch.full((12,), 3)
    low, high = clustered_interval(values.sum(-1), counts, seed=5)
    moved = clustered_interval((values * 10 + 4).sum(-1), counts, seed=5)
    assert [float(end) for end in moved] == pytest.approx([10 * float(low) + 4, 10 * float(high) + 4])
    turned = clustered_interval(-values.sum(-1), counts, seed=5)
    assert [float(end) for end in turned] == pytest.approx([-float(high), -float(low)])
    assert clustered_interval(values.sum(-1), counts, seed=5) == (low, high)
    assert clustered_interval(values.sum(-1), counts, seed=6) != (low, high)
