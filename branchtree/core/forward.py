"""Forward-process objectives: losses on clean samples that are noised again, for which a rollout needs no density.

F rows, each a clean sample x0 noised to a level sigma by a noise n. For flow matching x = (1 - sigma) * x0 + sigma * n,
and an exact model predicts the target n - x0. ``err(p)`` is how far a prediction p lies from the target: the mean
square over dimensions, or one of the variants of ``PredictionError``. ``v`` is the trained policy's prediction,
``v_old`` that of the policy that it is compared with, and A the sample's advantage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from branchtree.core.gaussian import like
from branchtree.core.loss import clipped_loss
from branchtree.core.segments import segment_mean

Prediction = Literal["velocity", "noise", "v"]

LEAST_ERROR = 1e-5
"""The least mean absolute error that a squared one is divided by."""


@dataclass(frozen=True)
class Noised:
    """F samples at their noise levels, and what an exact model predicts there."""

    states: Tensor  # (F, *latent)
    target: Tensor  # (F, *latent)
    sigma: Tensor  # (F,)
    scale: Tensor  # (F,): a prediction's error times this is the error of the clean sample that follows from it

    def rows(self, index: Tensor) -> Noised:
        """Return some of the samples."""
        return Noised(self.states[index], self.target[index], self.sigma[index], self.scale[index])


def noise_samples(clean: Tensor, noise: Tensor, sigma: Tensor, prediction: Prediction = "velocity") -> Noised:
    """Noise clean samples (F, *latent) to levels (F,), for a model that predicts this; see ``gaussian`` for the flows.

    A variance-preserving model has x = alpha * x0 + sigma * n with alpha^2 = 1 - sigma^2; its target is n, or
    v = alpha * n - sigma * x0.
    """
    level = like(sigma, clean).to(clean.dtype)
    if prediction == "velocity":
        return Noised((1 - level) * clean + level * noise, noise - clean, sigma, sigma)
    alpha = (1 - level.square()).sqrt()
    states = alpha * clean + level * noise
    if prediction == "v":
        return Noised(states, alpha * noise - level * clean, sigma, sigma)
    return Noised(states, noise, sigma, sigma / (1 - sigma.square()).sqrt())


def clean_samples(states: Tensor, prediction: Tensor, sigma: Tensor, kind: Prediction = "velocity") -> Tensor:
    """Return the clean samples that follow from predictions of that kind at states (B, *latent) of levels (B,)."""
    level = like(sigma, states)
    if kind == "velocity":
        return states - level * prediction
    alpha = (1 - level.square()).sqrt()
    return alpha * states - level * prediction if kind == "v" else (states - level * prediction) / alpha


def mean_square(difference: Tensor) -> Tensor:
    """Return the mean square over dimensions, (F,)."""
    return difference.flatten(1).square().mean(dim=1)


@dataclass(frozen=True)
class PredictionError:
    """How far predictions lie from their targets, (F,).

    ``adaptive`` is the mean square error of the clean samples that follow from the predictions, over their mean
    absolute error, a constant for the gradient (DiffusionNFT, arXiv 2509.16117; V-GRPO, arXiv 2604.23380): so
    no noise level outweighs the others.
    """

    measure: Literal["velocity", "adaptive"] = "velocity"
    weight: Literal["none", "sigma", "sigma_squared"] = "none"

    def __call__(self, noised: Noised, prediction: Tensor) -> Tensor:
        """Return the error of each row's prediction (F, *latent), differentiable."""
        difference, scale = prediction - noised.target, noised.scale.to(prediction.dtype)
        error = mean_square(difference)
        if self.measure == "adaptive":
            size = scale * difference.detach().flatten(1).abs().mean(dim=1)
            error = scale.square() * error / size.clamp_min(LEAST_ERROR)
        powers = {"none": 0, "sigma": 1, "sigma_squared": 2}
        return error * noised.sigma.to(error.dtype) ** powers[self.weight]


@dataclass(frozen=True)
class ForwardBatch:
    """F rows that a loss is computed of."""

    noised: Noised
    prediction: Tensor  # (F, *latent), differentiable
    old: Tensor  # (F, *latent), without a gradient
    advantage: Tensor  # (F,) of the row's sample; under a centred loss less its group's mean
    group_value: Tensor  # (F,) mean of ``ForwardLoss.value`` over the row's group; 0 unless the loss is centred


@dataclass(frozen=True)
class ForwardTerms:
    """The loss of each row, and what a run writes down about it where it has a meaning."""

    loss: Tensor  # (F,)
    ratio: Tensor | None = None  # (F,) rho
    clipped: Tensor | None = None  # (F,) bool: rows that the clip silences
    preference: Tensor | None = None  # (F,) how strongly a sample is wanted, 0 to 1


class ForwardLoss(ABC):
    """A loss of noised samples; each row's is differentiable in its prediction alone."""

    centred = False
    """Whether rows are compared with their group's mean: the samples of a prompt, or siblings, at the same draw."""
    whole_groups = False
    """Whether samples without an advantage are trained too, in a group where others have one."""

    @abstractmethod
    def __call__(self, batch: ForwardBatch) -> ForwardTerms:
        """Return the loss of each row."""

    def value(self, batch: ForwardBatch) -> Tensor:
        """Return the number (F,) whose mean over a group a centred loss needs; it is 0 where v = v_old."""
        raise NotImplementedError(f"{type(self).__name__} has no value to centre")


@dataclass(frozen=True)
class Nft(ForwardLoss):
    """DiffusionNFT (arXiv 2509.16117): towards better samples, and away from worse ones by a mirrored prediction.

    r * err(v+) + (1 - r) * err(v-), v+ = v_old + b (v - v_old), v- = v_old - b (v - v_old),
    r = 1/2 + 1/2 clip(A / range, -1, 1).
    """

    error: PredictionError
    beta: float = 1.0  # b
    advantage_range: float = 5.0

    whole_groups = True

    def __call__(self, batch: ForwardBatch) -> ForwardTerms:
        """See ForwardLoss."""
        preference = 0.5 + 0.5 * (batch.advantage / self.advantage_range).clamp(-1, 1)
        change = self.beta * (batch.prediction - batch.old)
        better, worse = (self.error(batch.noised, batch.old + sign * change) for sign in (1, -1))
        return ForwardTerms(preference * better + (1 - preference) * worse, preference=preference)


@dataclass(frozen=True)
class MatchingRatio(ForwardLoss):
    """PPO's clipped objective with -err(v) as log-density, so that rho = exp(err(v_old) - err(v)).

    Advantage-weighted matching (arXiv 2509.25050), and V-GRPO (arXiv 2604.23380), whose draws a group shares.
    """

    error: PredictionError
    clip: float = 1e-4

    def __call__(self, batch: ForwardBatch) -> ForwardTerms:
        """See ForwardLoss."""
        log_prob, old = (-self.error(batch.noised, each) for each in (batch.prediction, batch.old))
        ratio, advantage = (log_prob - old).exp(), batch.advantage
        clipped = (ratio.detach() - 1) * advantage > self.clip * advantage.abs()
        return ForwardTerms(clipped_loss(ratio, advantage, self.clip), ratio, clipped)


@dataclass(frozen=True)
class Crd(ForwardLoss):
    """Centred reward distillation (arXiv 2603.14128): implied rewards are regressed on advantages, both centred.

    (b * (r - mean r) - (A - mean A))^2 with r = err(v_old) - err(v) and means over the group. The mean of r is a
    constant for the gradient: over a whole group the centred residuals sum to 0, so this changes nothing.
    """

    error: PredictionError
    beta: float = 1.0  # b

    centred = True
    whole_groups = True

    def __call__(self, batch: ForwardBatch) -> ForwardTerms:
        """See ForwardLoss."""
        centred = self.value(batch) - batch.group_value
        return ForwardTerms((self.beta * centred - batch.advantage).square())

    def value(self, batch: ForwardBatch) -> Tensor:
        """Return the implied rewards (F,)."""
        return self.error(batch.noised, batch.old) - self.error(batch.noised, batch.prediction)


def group_means(value: Tensor, group: Tensor) -> Tensor:
    """Return the mean of ``value`` (F,) over the rows whose ``group`` (F, columns) is the same, for each row (F,)."""
    if not len(value):
        return value
    _, index = torch.unique(group, dim=0, return_inverse=True)
    mean: Tensor = segment_mean(value, index, int(index.max()) + 1)
    return mean[index]
