"""The time that a pipeline gives its model at each noise level, and the grids of its own scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Clock(Protocol):
    """Relates noise levels to times."""

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times (B,) at noise levels (B,)."""

    def levels(self, times: Tensor, sigmas: Tensor) -> Tensor:
        """Return the noise levels (T + 1,) of a scheduler's grid of times (T,) and sigmas, down to 0."""


@dataclass(frozen=True)
class LinearClock:
    """Times in proportion to sigma, as most flow-matching models have them."""

    steps: int

    def time(self, sigma: Tensor) -> Tensor:
        """See Clock."""
        return sigma * self.steps

    def levels(self, times: Tensor, sigmas: Tensor) -> Tensor:
        """See Clock."""
        return sigmas


@dataclass(frozen=True)
class TableClock:
    """Times by interpolation between those of a fine grid."""

    times: Tensor  # (N,) ascending
    sigmas: Tensor  # (N,) ascending
    variance_preserving: bool = False

    def time(self, sigma: Tensor) -> Tensor:
        """See Clock."""
        return _interpolated(sigma, self.sigmas, self.times)

    def levels(self, times: Tensor, sigmas: Tensor) -> Tensor:
        """See Clock. A scheduler's sigmas of a variance-preserving process are of another kind."""
        if not self.variance_preserving:
            return sigmas
        return torch.cat([_interpolated(times, self.times, self.sigmas), torch.zeros(1)])


def _interpolated(at: Tensor, known: Tensor, values: Tensor) -> Tensor:
    known, values = known.to(at), values.to(at)
    above = torch.searchsorted(known, at.contiguous()).clamp(1, len(known) - 1)
    weight = (at - known[above - 1]) / (known[above] - known[above - 1])
    return values[above - 1] + weight * (values[above] - values[above - 1])


def predicted(scheduler: Mapping[str, Any]) -> str:
    """Return what a model predicts, ``velocity``, ``noise`` or ``v``, by its scheduler's configuration."""
    default = "epsilon" if "beta_schedule" in scheduler else "flow_prediction"
    kind = scheduler.get("prediction_type", default)
    if "flow" in kind or scheduler.get("use_flow_sigmas"):
        return "velocity"
    return {"epsilon": "noise", "v_prediction": "v"}.get(kind, "velocity")


def noise_clock(scheduler: Any) -> TableClock:
    """Return the clock of a model that predicts noise or v: sigma is sqrt(1 - alpha_bar), by the schedule's steps."""
    sigmas = (1 - scheduler.alphas_cumprod.double()).sqrt().float()
    return TableClock(torch.arange(len(sigmas), dtype=torch.float32), sigmas, variance_preserving=True)


def flow_clock(steps: int, grid: tuple[Tensor, Tensor], fine: Callable[[], tuple[Tensor, Tensor]]) -> Clock:
    """Return the clock of a flow-matching model by a grid of its own; by a ``fine`` one where times are no multiples.

    Times that are ``steps`` sigma but for rounding are taken as that.
    """
    times, sigmas = grid
    if float((times - sigmas[: len(times)] * steps).abs().max()) <= 1.01:
        return LinearClock(steps)
    times, sigmas = fine()
    return TableClock(times.flip(0), sigmas[: len(times)].flip(0))
