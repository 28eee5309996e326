"""The transition ``unmask``: each step reveals the positions whose turn it is, each by the model's distribution.

Which positions these are depends on what is given, the order and the noise levels alone, never on what the network
thinks: so the gradient pass scores the tokens that the rollout drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from branchtree.core.categorical import CategoricalTransition
from branchtree.core.transitions import Reduction
from branchtree.errors import RecipeError
from branchtree_tokens.network import CAP
from branchtree_tokens.tasks import VOCABULARY


class UnmaskConfig(BaseModel, extra="forbid", frozen=True):
    """``order``: of the unknown positions, first to last, last to first, or shuffled once for all by ``seed``.

    Tokens are drawn at the ``temperature``, whose densities are what is trained.
    """

    order: Literal["raster", "reverse", "shuffled"] = "raster"
    seed: int = 0
    temperature: float = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class Reveal:
    """Reveals tokens of states (B, 2, n), and counts the steps that each has been known: its age."""

    words: CategoricalTransition
    ages: Tensor  # (B, n) integers, after the step; 0 of what is still unknown

    def sample(self, noise: Tensor | None) -> Tensor:
        """Return the next states for noise (B, n, V)."""
        return torch.stack([self.words.sample(noise), self.ages], 1)

    def log_prob(self, following: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the log-probability (B,) of the tokens that were revealed; ages follow from the step alone."""
        return self.words.log_prob(following[:, 0], reduction)

    def kl(self, reference: Reveal, reduction: Reduction = "mean") -> Tensor:
        """Return the divergence (B,) from a reference's distributions."""
        return self.words.kl(reference.words, reduction)

    def rows(self, index: Tensor) -> Reveal:
        """See Transition."""
        return Reveal(self.words.rows(index), self.ages[index])


@dataclass(frozen=True)
class Unmask:
    """Of m unknown positions, those of ranks m(1 - sigma) to m(1 - sigma_next), rounded up; given ones at any time."""

    order: str = "raster"
    seed: int = 0
    temperature: float = 1.0

    def noise_shape(self, latent: Sequence[int]) -> Sequence[int]:
        """One number for each position and word."""
        return latent[-1], len(VOCABULARY)

    def __call__(
        self, latents: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, active: Tensor
    ) -> Reveal:
        """Return the transitions of states (B, 2, n) under logits (B, n, V)."""
        tokens, ages = latents.unbind(1)
        given = prediction.amax(-1) - prediction.amin(-1) > 2 * CAP
        order = self._order(tokens.shape[1]).to(tokens.device)
        ranks = torch.empty_like(tokens)
        ranks[:, order] = (~given)[:, order].cumsum(1) - 1
        unknown = (~given).sum(1).double()
        # Rounded up: the last step, which draws nothing at random, has the fewest. Noise levels are rounded themselves.
        first, end = (torch.ceil(unknown * (1 - level.double()) - 1e-4)[:, None] for level in (sigma, sigma_next))
        drawn = given | ((ranks >= first) & (ranks < end))
        words = CategoricalTransition(tokens, (prediction / self.temperature).log_softmax(-1), drawn, active)
        return Reveal(words, torch.where(drawn | (ages > 0), ages + 1, 0))

    def _order(self, count: int) -> Tensor:
        """Return the positions in the order in which they are revealed."""
        if self.order == "shuffled":
            return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return torch.arange(count) if self.order == "raster" else torch.arange(count).flip(0)


def build_unmask(config: UnmaskConfig, section: Any, prediction: str) -> Unmask:
    """Return the kernel. Raises RecipeError for a model that predicts no logits."""
    if prediction != "logits":
        raise RecipeError(f"sampler.transition: 'unmask' does not suit a model that predicts {prediction}, only logits")
    return Unmask(config.order, config.seed, config.temperature)
