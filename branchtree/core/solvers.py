"""Solvers of the flow's ODE for what follows the last stochastic step. B rows, each at its own noise level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from branchtree.core.gaussian import like
from branchtree.core.transfer import send

Solver = Literal["euler", "dpm2m"]


@dataclass(frozen=True)
class SolverHistory:
    """The clean estimate of each row's step before, (B, *latent), and its noise level (B,); NaN where there is none."""

    clean: Tensor
    sigma: Tensor

    @staticmethod
    def empty(latents: Tensor) -> SolverHistory:
        """Return the history of latents (B, *latent) that have taken no step."""
        return SolverHistory(torch.zeros_like(latents), torch.full((len(latents),), torch.nan, device=latents.device))

    def rows(self, index: Tensor) -> SolverHistory:
        """Return the history of some rows, with repetition; ``index`` (B,) is on the host."""
        index = send(index, self.clean.device)
        return SolverHistory(self.clean[index], self.sigma[index])


def dpm2m(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, history: SolverHistory
) -> tuple[Tensor, SolverHistory]:
    """A step of DPM-Solver++(2M) for flow matching, and what the next one needs (arXiv 2211.01095, algorithm 2).

    With alpha = 1 - sigma and lambda = log(alpha / sigma), h the step in lambda and r the last step over this one,

        x' = sigma' / sigma * x - alpha' * (exp(-h) - 1) * D,    D = x0 + (x0 - x0_before) / (2 r)

    and D = x0 on a row's first step, and on a step from or to an end of the grid, where lambda is infinite. A step to
    sigma' = 0 gives the clean estimate x0 itself.
    """
    clean = latents - like(sigma, latents) * velocity
    before, here, there = (_log_ratio(level) for level in (history.sigma, sigma, sigma_next))
    correction = (there - here) / (2 * (here - before))
    usable = correction.isfinite()
    slope = like(correction.where(usable, torch.zeros_like(correction)), latents)
    estimate = clean + slope * (clean - history.clean)
    kept = like(sigma_next / sigma, latents)  # exp(-h) alpha' is kept * (1 - sigma), finite at both ends of the grid
    gained = like((1 - sigma_next) - (1 - sigma) * sigma_next / sigma, latents)
    return kept * latents + gained * estimate, SolverHistory(clean, sigma)


def _log_ratio(sigma: Tensor) -> Tensor:
    """lambda = log((1 - sigma) / sigma)."""
    return torch.log1p(-sigma) - sigma.log()
