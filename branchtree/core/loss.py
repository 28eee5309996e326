"""The loss of a tree's edges: how likely each has become, and how far that may go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.gaussian import GaussianTransition
from branchtree.core.transitions import Transition
from branchtree.core.weighting import StepWeighting


@dataclass(frozen=True)
class Edges:
    """E edges under the policy that is trained, and under the old one, which made the rollout."""

    advantage: Tensor  # (E,)
    following: Tensor  # (E, *latent), the states that the edges lead to
    transition: Transition  # of E rows, differentiable
    log_prob: Tensor  # (E,), differentiable
    old_log_prob: Tensor  # (E,)
    old_transition: Transition | None = None  # of E rows, where a rule compares transitions

    @property
    def old(self) -> Transition:
        """The old policy's transitions. Raises ValueError where no rule asked for them."""
        if self.old_transition is None:
            raise ValueError("a rule that reads old transitions must have compares_transitions = True")
        return self.old_transition


EdgeRatio = Callable[[Edges], Tensor]
"""edges -> ratio (E,) of new to old, differentiable; 1 where the policy has not changed."""

EdgeLoss = Callable[[Tensor, Edges], Tensor]
"""(ratio (E,), edges) -> loss (E,), differentiable in the ratio."""


@dataclass(frozen=True)
class EdgeRules:
    """What makes up the loss of an edge.

    A ratio or a loss that reads ``Edges.old`` has an attribute ``compares_transitions``, which is true.
    """

    ratio: EdgeRatio
    loss: EdgeLoss
    weighting: StepWeighting | None = None  # all steps weigh the same by default
    recomputed: bool = False  # whether old densities are computed again, in the batches that are trained

    @property
    def compares_transitions(self) -> bool:
        """Return whether a rule reads old transitions."""
        return any(getattr(rule, "compares_transitions", False) for rule in (self.ratio, self.loss))

    @property
    def looks_back(self) -> bool:
        """Return whether a forward with the old weights is needed before they change."""
        return self.recomputed or self.compares_transitions


def plain_ratio(edges: Edges) -> Tensor:
    """rho = p_new / p_old of each edge, (E,)."""
    return (edges.log_prob - edges.old_log_prob).exp()


@dataclass(frozen=True)
class CentredRatio:
    """GRPO-Guard's ratio (arXiv 2510.22319): exp((log p_new - log p_old + b) * s), densities being means.

    s is the deviation of the step's noise and b = KL(new, old) = mean((mean_new - mean_old)^2) / (2 s^2). This is
    exp(mean(eps * (mean_new - mean_old))) for the noise eps of the edge, which is how it is computed: a difference of
    log-densities would lose the digits that a narrow clip range is about.
    """

    compares_transitions = True

    def __call__(self, edges: Edges) -> Tensor:
        """See EdgeRatio. Raises ValueError for a transition that is not Gaussian."""
        new, old = edges.transition, edges.old
        if not (isinstance(new, GaussianTransition) and isinstance(old, GaussianTransition)):
            raise ValueError(f"the centred ratio needs Gaussian transitions, not a {type(new).__name__}")
        scaled = (edges.following - old.mean) * (new.mean - old.mean)
        return (scaled.flatten(1).mean(dim=1) / old.std.flatten()).exp()


def clipped_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-min(rho * A, clip(rho, 1 - eps, 1 + eps) * A) of each edge, (E,) (PPO, arXiv 1707.06347, eq. 7)."""
    if ratio.shape != advantage.shape:
        raise ValueError(f"{tuple(ratio.shape)} ratios and {tuple(advantage.shape)} advantages")
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


@dataclass(frozen=True)
class ClippedLoss:
    """PPO's clipped objective; see ``clipped_loss``."""

    clip: float

    def __call__(self, ratio: Tensor, edges: Edges) -> Tensor:
        """See EdgeLoss."""
        return clipped_loss(ratio, edges.advantage, self.clip)


@dataclass(frozen=True)
class DivergenceMask:
    """Flow-DPPO's objective (arXiv 2606.11025): -rho * A, and 0 for edges that have gone too far.

    Those are edges whose transition diverges by more than ``limit`` from the old one, as a mean over dimensions, and
    whose ratio has moved the way that their advantage favours.
    """

    limit: float
    compares_transitions = True

    def __call__(self, ratio: Tensor, edges: Edges) -> Tensor:
        """See EdgeLoss."""
        with torch.no_grad():
            far = edges.transition.kl(edges.old, "mean") > self.limit
            favoured = (ratio - 1) * edges.advantage > 0
        loss = -ratio * edges.advantage
        return torch.where(far & favoured, torch.zeros_like(loss), loss)


def silenced(losses: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
    """Return the edges, (E,) bool, that have an advantage but whose loss does not change with their ratio."""
    (slope,) = torch.autograd.grad(losses.sum(), ratio, retain_graph=True, allow_unused=True)
    if slope is None:  # a loss that does not look at ratios
        return torch.zeros_like(advantage, dtype=torch.bool)
    return (slope == 0) & (advantage != 0)
