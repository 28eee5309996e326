"""How sure a mean is: a studentised bootstrap that resamples whole prompts.

The samples of one prompt are not independent, so the prompts are what is drawn. The plain percentile interval is too
narrow when they are few: it leaves the true mean out 1 time in 10, not 1 in 20, for 10 prompts. Here each resample's
error is divided by its own standard error (bootstrap-t: Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 12.5), which also follows a skewed distribution, and no end lies closer than that of Student's t interval,
which holds for very few prompts too. Axis letters: G prompts, B resamples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from branchtree.core.noise import Purpose, generator
from branchtree.core.rollout import chunks
from branchtree.core.student import student_quantile

RESAMPLES, LEVEL = 10_000, 0.95
BLOCK = 2**22
"""Numbers in one block of draws: 32 MiB."""
ROUNDING = 1e-12
"""A resample's variance below this fraction of its terms is 0: all its prompts are alike."""


def clustered_interval(
    sums: Tensor, counts: Tensor, seed: int, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[Tensor, Tensor]:
    """Return the two ends (...) of an interval for the mean over samples, sum(sums) / sum(counts).

    ``sums`` (..., G) and ``counts`` (..., G) are, of each of G prompts, the total of its values and their number,
    which is above 0. Leading axes are separate data sets. The draws are addressed by ``seed`` and depend on G alone.
    Raises ValueError for fewer than 2 prompts, of which no interval can be known.
    """
    prompts = sums.shape[-1]
    if prompts < 2:
        raise ValueError("an interval over prompts needs at least 2 of them")
    sums, counts = sums.double(), counts.double()
    mean = sums.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True)
    residuals = sums - mean * counts
    error = _standard_error(residuals.square().sum(-1), counts.sum(-1), prompts)
    tail = (1 - level) / 2
    ratios = _studentised(residuals, counts, seed, resamples)
    # A ratio's upper tail is where the mean came out too high: it sets the lower end, and the other way round.
    furthest = student_quantile(1 - tail, prompts - 1)
    above = ratios.nanquantile(1 - tail, dim=-1).nan_to_num(0.0).clamp(min=furthest)
    below = ratios.nanquantile(tail, dim=-1).nan_to_num(0.0).clamp(max=-furthest)
    return mean.squeeze(-1) - above * error, mean.squeeze(-1) - below * error


def _standard_error(squares: Tensor, samples: Tensor, prompts: int) -> Tensor:
    """Return a mean's cluster-robust standard error from the sum of its prompts' squared residuals (G / (G - 1))."""
    return (squares * prompts / (prompts - 1)).sqrt() / samples


def _studentised(residuals: Tensor, counts: Tensor, seed: int, resamples: int) -> Tensor:
    """Return each resample's error over its own standard error (..., B); NaN where all its prompts are alike."""
    prompts = residuals.shape[-1]
    draws = generator(seed, 0, 0, 0, 0, Purpose.RESAMPLING)
    ratios: list[Tensor] = []
    for span in chunks(resamples, max(BLOCK // prompts, 1)):
        drawn = torch.randint(prompts, (len(span), prompts), generator=draws)
        weights = torch.zeros(len(span), prompts, dtype=torch.float64)
        weights = weights.scatter_add_(1, drawn, torch.ones_like(weights)).T  # (G, B): how often each prompt came
        samples = counts @ weights
        shift = (residuals @ weights) / samples
        # Residuals about the resample's own mean: r_g - shift * n_g, squared and summed.
        size = residuals.square() @ weights + shift.square() * (counts.square() @ weights)
        squares = size - 2 * shift * ((residuals * counts) @ weights)
        error = _standard_error(squares.where(squares > ROUNDING * size, torch.nan), samples, prompts)
        ratios.append(shift / error)
    return torch.cat(ratios, dim=-1)
