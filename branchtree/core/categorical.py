"""Transitions of discrete states: tokens that are drawn from a model's distribution over a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.transitions import Reduction


def gumbel(noise: Tensor) -> Tensor:
    """Return Gumbel noise for standard normal noise, number by number, in float64.

    Each number has the Gumbel distribution exactly, whatever its dependence on others: so rules for siblings whose
    noise is normal, correlated or antithetic, also hold for tokens.
    """
    return -torch.log(-torch.special.log_ndtr(noise.double()))


@dataclass(frozen=True)
class CategoricalTransition:
    """Tokens drawn at some positions of each row; at the others the row keeps what it has.

    A row that is not ``random`` takes the likeliest tokens, and its log-density is 0 by convention.
    """

    tokens: Tensor  # (B, n) integers, before the step
    log_probs: Tensor  # (B, n, V) float32, normalised over V
    drawn: Tensor  # (B, n) bool
    random: Tensor  # (B,) bool

    def sample(self, noise: Tensor | None) -> Tensor:
        """Return the next tokens (B, n) for standard normal noise (B, n, V), by the Gumbel-max trick."""
        scores = self.log_probs.double()
        if noise is not None:
            scores = scores + gumbel(noise) * self.random[:, None, None]
        return torch.where(self.drawn, scores.argmax(-1), self.tokens)

    def log_prob(self, following: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the log-probability (B,) of the drawn tokens of ``following`` (B, n), over n under ``mean``."""
        known = torch.where(self.drawn, following, 0).long()  # a mask's index may lie beyond the vocabulary
        chosen = self.log_probs.gather(-1, known.unsqueeze(-1))[..., 0]
        return self._reduced(chosen, reduction)

    def kl(self, reference: CategoricalTransition, reduction: Reduction = "mean") -> Tensor:
        """Return KL(self || reference) (B,) of the drawn positions' distributions, over n under ``mean``."""
        difference = self.log_probs - reference.log_probs
        terms = torch.where(self.log_probs > -torch.inf, self.log_probs.exp() * difference, 0.0)
        return self._reduced(terms.sum(-1), reduction)

    def rows(self, index: Tensor) -> CategoricalTransition:
        """See Transition."""
        return CategoricalTransition(self.tokens[index], self.log_probs[index], self.drawn[index], self.random[index])

    def _reduced(self, values: Tensor, reduction: Reduction) -> Tensor:
        """Sum the drawn positions of random rows, or average over all positions."""
        kept = torch.where(self.drawn & self.random[:, None], values, 0.0).sum(-1)
        return kept / self.tokens.shape[1] if reduction == "mean" else kept
