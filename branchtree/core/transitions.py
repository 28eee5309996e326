"""One denoising step as a distribution: what a transition and the kernel that makes it must offer.

Growing a tree and the gradient pass know no more about a modality than this. States are float32 or integers, and what
the model predicts need not have their shape. ``gaussian`` has the transitions of diffusion and flow matching,
``categorical`` one of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, Self, runtime_checkable

from torch import Tensor

Reduction = Literal["mean", "sum"]


class Transition(Protocol):
    """The distributions of B next states, of which some may be deterministic."""

    def sample(self, noise: Tensor | None) -> Tensor:
        """Return the next states (B, *latent) for base noise (B, *noise); None where no row is stochastic."""

    def log_prob(self, following: Tensor, reduction: Reduction) -> Tensor:
        """Return the log-density (B,) of the states that followed, 0 for deterministic rows; differentiable."""

    def kl(self, reference: Self, reduction: Reduction) -> Tensor:
        """Return the divergence from a reference's transitions (B,), 0 for deterministic rows; differentiable."""

    def rows(self, index: Tensor) -> Self:
        """Return the transitions of some rows, with repetition: one parent's transition serves all its children."""


class Kernel(Protocol):
    """Makes the transition from what the model predicts.

    ``active`` (B,) says which rows take a stochastic step; the others take the deterministic step of the same kernel,
    which is its limit of no noise. It is bool, unless a plan scales the noise: then it is float32, 0 for a
    deterministic row, and elsewhere the row's noise over the kernel's own. Only a kernel that ``ScalesNoise`` gets such
    factors.
    """

    def __call__(
        self, latents: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, active: Tensor
    ) -> Transition:
        """latents, prediction (B, *latent); sigma, sigma_next (B,); active (B,)."""


@runtime_checkable
class ScalesNoise(Protocol):
    """A kernel whose noise has a scale that its states do not change.

    ``loss.weighting: noise`` needs one, and so does noise that differs from split to split.
    """

    def noise_scale(self, sigma: Tensor, sigma_next: Tensor, active: Tensor | None = None) -> Tensor:
        """Return the standard deviation that a stochastic step adds, (B,), for noise levels (B,).

        ``active`` (B,) is that of ``Kernel``; without it each row has the kernel's own noise.
        """


@runtime_checkable
class ShapesNoise(Protocol):
    """A kernel whose transitions take base noise of another shape than the states'."""

    def noise_shape(self, latent: Sequence[int]) -> Sequence[int]:
        """Return the shape of one row's noise for states of shape ``latent``."""
