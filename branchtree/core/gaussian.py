"""Gaussian transitions, and the kernels of flow matching and noise prediction that make them.

x has B rows, each at its own noise level sigma, going to sigma' = sigma_next < sigma. D = sigma' - sigma < 0.
For flow matching x = (1 - sigma) * x0 + sigma * x1 with x1 ~ N(0, I), the model predicts the velocity
v = x1 - x0, and so x0 = x - sigma * v, x1 = x + (1 - sigma) * v, score = -x1 / sigma.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from branchtree.core.transitions import Reduction

LOG_SQRT_TAU = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class GaussianTransition:
    """N(mean, std^2 I), float32; std 0 marks a deterministic row, whose log-density is 0 by convention."""

    mean: Tensor  # (B, *latent)
    std: Tensor  # (B, 1, ...)

    def sample(self, noise: Tensor | None) -> Tensor:
        """Return mean + std * noise, noise (B, *latent); the mean where no row is stochastic and none was drawn."""
        return self.mean + self.std * (torch.zeros_like(self.mean) if noise is None else noise)

    def log_prob(self, following: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Log-density (B,) of ``following`` (B, *latent), averaged over latent dimensions or summed.

        The average is DanceGRPO's convention (arXiv 2505.07818, released trainer).
        """
        std, random = self._scale()
        distance = (following - self.mean).flatten(1).square().mean(dim=1)
        density = -0.5 * distance / std.square() - std.log() - LOG_SQRT_TAU
        return self._reduced(density.where(random, torch.zeros_like(density)), reduction)

    def rows(self, index: Tensor) -> GaussianTransition:
        """See Transition."""
        return GaussianTransition(mean=self.mean[index], std=self.std[index])

    def kl(self, reference: GaussianTransition, reduction: Reduction = "mean") -> Tensor:
        """KL(self || reference) (B,) for equal std: (mean - mean_ref)^2 / (2 std^2); 0 for deterministic rows."""
        std, random = self._scale()
        distance = (self.mean - reference.mean).flatten(1).square().mean(dim=1)
        divergence = 0.5 * distance / std.square()
        return self._reduced(divergence.where(random, torch.zeros_like(divergence)), reduction)

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Each row's std (B,), 1 where it is deterministic, and which rows are not."""
        std = self.std.flatten()
        return std.where(std > 0, torch.ones_like(std)), std > 0

    def _reduced(self, average: Tensor, reduction: Reduction) -> Tensor:
        return average if reduction == "mean" else average * self.mean[0].numel()


def like(rows: Tensor, latents: Tensor) -> Tensor:
    """A vector (B,) as float32 (B, 1, ...) that broadcasts against latents (B, *latent)."""
    return rows.to(device=latents.device, dtype=torch.float32).view(-1, *[1] * (latents.ndim - 1))


class GaussianKernel(ABC):
    """A kernel of Gaussian transitions, whose noise does not depend on the states."""

    @abstractmethod
    def __call__(
        self, latents: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, active: Tensor
    ) -> GaussianTransition:
        """See Kernel."""

    def noise_scale(self, sigma: Tensor, sigma_next: Tensor, active: Tensor | None = None) -> Tensor:
        """See ScalesNoise."""
        nothing = torch.zeros(len(sigma), 1)
        active = torch.ones(len(sigma), dtype=torch.bool) if active is None else active
        return self(nothing, nothing, sigma, sigma_next, active).std.flatten()


def flow_sde(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> GaussianTransition:
    """The Euler-Maruyama step of the flow's reverse SDE at noise level g = ``level``; everything (B, ...).

    mean = x + (v - g^2 / 2 * score) * D, std = g * sqrt(-D). Sign: D < 0, and the SDE that shares the flow's
    marginals runs dx = (v - g^2 / 2 * score) dsigma + g dw backwards in sigma (arXiv 2505.07818, 2505.05470).
    """
    step = sigma_next - sigma
    # With score = -(x + (1 - sigma) * v) / sigma the mean is linear in x and v: two passes over the latents.
    drift = 0.5 * level.square() / sigma
    mean = (1 + drift * step) * latents + (1 + drift * (1 - sigma)) * step * velocity
    return GaussianTransition(mean=mean, std=level * (-step).sqrt())


@dataclass(frozen=True)
class DanceSde(GaussianKernel):
    """g = eta, the same at every noise level (DanceGRPO, arXiv 2505.07818)."""

    eta: float = 0.3

    def __call__(
        self, latents: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, active: Tensor
    ) -> GaussianTransition:
        """See Kernel."""
        level = like(self.eta * active, latents)
        return flow_sde(latents, prediction, like(sigma, latents), like(sigma_next, latents), level)


@dataclass(frozen=True)
class FlowSde(GaussianKernel):
    """g = eta * sqrt(sigma / (1 - sigma)) (Flow-GRPO, arXiv 2505.05470).

    At sigma = 1, where the quotient has no value, the denominator is 1 - sigma_next, as in the released trainer.
    """

    eta: float = 0.7

    def __call__(
        self, latents: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, active: Tensor
    ) -> GaussianTransition:
        """See Kernel."""
        remaining = 1 - torch.where(sigma == 1, sigma_next, sigma)
        level = like(self.eta * active * (sigma / remaining).sqrt(), latents)
        return flow_sde(latents, prediction, like(sigma, latents), like(sigma_next, latents), level)


@dataclass(frozen=True)
class CpsSde(GaussianKernel):
    """Coefficient-preserving sampling: the noise budget sigma' is split by an angle (Flow-CPS, arXiv 2509.05952).

    mean = (1 - s') * x0 + s' * cos(eta * pi / 2) * x1, std = s' * sin(eta * pi / 2), s' = sigma_next. Unlike the
    other kernels this one does not keep the model's marginals, however fine the grid: it narrows them.
    """

    eta: float = 0.7

    def __call__(
        self, latents: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, active: Tensor
    ) -> GaussianTransition:
        """See Kernel."""
        angle = like(0.5 * math.pi * self.eta * active, latents)
        here, there = like(sigma, latents), like(sigma_next, latents)
        clean = latents - here * prediction
        noise = latents + (1 - here) * prediction
        return GaussianTransition(mean=(1 - there) * clean + there * angle.cos() * noise, std=there * angle.sin())


@dataclass(frozen=True)
class Ddim(GaussianKernel):
    """The eta-DDIM posterior of variance-preserving models (arXiv 2010.02502, eq. 12 and 16).

    Here x = alpha * x0 + sigma * noise with alpha^2 = 1 - sigma^2. The model predicts the noise, or
    v = alpha * noise - sigma * x0. A noise prediction says nothing about x0 at sigma = 1: use a grid that
    starts below it.
    """

    eta: float = 1.0
    prediction: Literal["noise", "v"] = "noise"

    def __call__(
        self, latents: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, active: Tensor
    ) -> GaussianTransition:
        """See Kernel."""
        here, there = like(sigma, latents), like(sigma_next, latents)
        alpha, alpha_next = (1 - here.square()).sqrt(), (1 - there.square()).sqrt()
        if self.prediction == "noise":
            noise = prediction
            clean = (latents - here * noise) / alpha
        else:
            noise = here * latents + alpha * prediction
            clean = alpha * latents - here * prediction
        eta = like(self.eta * active, latents)
        std = eta * (there / here) * (1 - (alpha / alpha_next).square()).sqrt()
        direction = (there.square() - std.square()).clamp_min(0).sqrt()
        return GaussianTransition(mean=alpha_next * clean + direction * noise, std=std)
