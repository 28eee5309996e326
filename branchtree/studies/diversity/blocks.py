"""An unbiased MMD^2 of samples that come in dependent groups, and its interval by a block bootstrap.

The leaves of one tree share their initial noise and ancestors. The usual unbiased estimate counts pairs of one tree as
if they were independent, and so rises with what the leaves share, even where the two laws are equal. Here only pairs of
different groups are counted. Axis letters: G groups of both sets together, B bootstrap draws.

Prompts are held fixed. Group a is of set x (s_a = 1) or y (s_a = -1), of which G_a is the number of groups, g_a of them
of the prompt of a:

    U = sum over a != b of M_ab,   M_ab = s_a s_b kbar(a, b) / (G_a G_b) * r_ab,

where kbar is the mean kernel value of two groups' pairs, and r_ab is g_a / (g_a - 1) for two groups of one set and
prompt, which makes up for a = b, and 1 otherwise. For independent groups the mean of U is the MMD^2 of the two mixtures
over these prompts.

Bootstrap: groups are drawn with replacement within their set and prompt, and never paired with themselves, so that a
group drawn twice does not count as two that agree. With weights 1 + e_a, e_a = sqrt(g_a / (g_a - 1)) (times drawn - 1),

    U* = U + 2 e.(M 1) + e.M'.e - (mean of the latter),

where M' is M with the mean entry of each set and prompt on its diagonal: the level of a kernel then cancels. The
interval lies between quantiles of U*. Where the laws differ the linear part rules, as usual. Where they are equal U is
degenerate, and the interval is too wide rather than too narrow: M 1 is then noise of twice the variance of U, to which
the quadratic part adds as much again, so that U* spreads up to 1.7 times as far as U. Shrinking the linear part would
be right for equal laws (Arcones and Gine 1992), but covers too seldom for slightly different ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class BlockInterval:
    """An estimate, its standard error and its interval."""

    value: float
    error: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Groups:
    """The groups of two sets."""

    prompt_x: Tensor  # (G_x,) int64, the prompt of each group
    prompt_y: Tensor  # (G_y,)

    def __post_init__(self) -> None:
        x, y = (torch.bincount(prompt) / len(prompt) for prompt in (self.prompt_x, self.prompt_y))
        if x.shape != y.shape or not torch.allclose(x, y):
            raise ValueError("both sets must hold the same prompts in the same proportions")
        if int(self.size.min()) < 2:
            raise ValueError("each prompt needs at least two groups in each set")

    @property
    def cell(self) -> Tensor:
        """The set and prompt of each group as one number, (G,); groups of x first."""
        return torch.cat([self.prompt_x, self.prompt_y + int(self.prompt_x.max()) + 1])

    @property
    def size(self) -> Tensor:
        """How many groups share each group's set and prompt, (G,)."""
        return torch.bincount(self.cell)[self.cell]

    @property
    def coefficient(self) -> Tensor:
        """s_a / G_a, (G,) float64."""
        x, y = len(self.prompt_x), len(self.prompt_y)
        return torch.tensor([1 / x] * x + [-1 / y] * y, dtype=torch.float64)


def block_mmd(
    within_x: Tensor,
    within_y: Tensor,
    between: Tensor,
    groups: Groups,
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> BlockInterval:
    """Return U and its interval.

    Args:
        within_x: Mean kernel value of the pairs of two groups of x, (G_x, G_x); the diagonal is not looked at.
        within_y: The same of y, (G_y, G_y).
        between: The same of a group of x and one of y, (G_x, G_y).
        groups: Which prompts the groups belong to.
        seed: What the bootstrap is drawn by.
        draws: B.
        level: What the interval is to cover.
    """
    matrix = _signed(within_x, within_y, between, groups)
    value, influence = float(matrix.sum()), matrix.sum(dim=1)
    change = _weight_changes(groups, draws, seed)
    completed = _with_diagonal(matrix, groups)
    linear, quadratic = 2 * change @ influence, ((change @ completed) * change).sum(dim=1)
    drawn = value + linear + quadratic - quadratic.mean()
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = drawn.quantile(tails).tolist()
    return BlockInterval(value, float(drawn.std()), low, high, level)


def _signed(within_x: Tensor, within_y: Tensor, between: Tensor, groups: Groups) -> Tensor:
    """Return M, (G, G) float64."""
    kernel = torch.cat([torch.cat([within_x, between], dim=1), torch.cat([between.T, within_y], dim=1)]).double()
    same = groups.cell[:, None] == groups.cell[None, :]
    size = groups.size.double()
    repeated = torch.where(same, (size / (size - 1))[:, None], torch.ones_like(kernel))
    weight = groups.coefficient[:, None] * groups.coefficient[None, :] * repeated
    return (weight * kernel).fill_diagonal_(0)


def _with_diagonal(matrix: Tensor, groups: Groups) -> Tensor:
    """Return M with a cell's mean entry on its diagonal, so that a kernel's level cancels in e.M.e."""
    same = (groups.cell[:, None] == groups.cell[None, :]).double()
    size = groups.size.double()
    totals = torch.zeros(int(groups.cell.max()) + 1, dtype=torch.float64)
    totals.index_add_(0, groups.cell, (matrix * same).sum(dim=1))
    return matrix + torch.diag(totals[groups.cell] / (size * (size - 1)))


def _weight_changes(groups: Groups, draws: int, seed: int) -> Tensor:
    """Return e, (B, G) float64: how far each group's weight is from 1 in each draw."""
    source = torch.Generator().manual_seed(seed)
    counts = torch.empty(draws, len(groups.cell), dtype=torch.float64)
    for cell in groups.cell.unique().tolist():
        members = torch.nonzero(groups.cell == cell)[:, 0]
        drawn = torch.randint(len(members), (draws, len(members)), generator=source)
        counts[:, members] = torch.nn.functional.one_hot(drawn, len(members)).sum(dim=1).double()
    size = groups.size.double()
    return (counts - 1) * (size / (size - 1)).sqrt()
