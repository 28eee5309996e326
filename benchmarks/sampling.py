"""Timing a part of an iteration's batches, each at its true size, and scaling by their counts."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from operations import synchronize
from torch import Tensor

from branchtree.core.rollout import VelocityFunction


@dataclass(frozen=True)
class Timed:
    """A phase of an iteration: what was run of it, and what the whole of it takes."""

    rows: int  # of the whole phase
    rows_run: int
    seconds_run: float  # measured
    seconds: float  # measured where all of it was run, else scaled

    @staticmethod
    def scaled(rows: int, rows_run: int, seconds: float) -> Timed:
        """A phase whose time is proportional to its rows."""
        return Timed(rows, rows_run, seconds, seconds * rows / rows_run)

    def record(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


@dataclass
class SampledDenoiser:
    """Sends a share of a rollout's batches through a denoiser and times each; the others get a velocity of zero.

    Batches of one size are of a kind. The first of each is run, the further ones evenly spread, so that of n at least
    ``share`` n are run.
    """

    velocity: VelocityFunction
    device: torch.device
    share: float
    seen: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __call__(self, latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """The velocity of a batch that is run; zero otherwise."""
        rows = len(latents)
        self.seen[rows] += 1
        if len(self.seconds[rows]) >= max(math.ceil(self.share * self.seen[rows]), 1):
            return torch.zeros_like(latents)
        synchronize(self.device)
        start = time.perf_counter()
        velocity = self.velocity(latents, sigma, prompt)
        synchronize(self.device)
        self.seconds[rows].append(time.perf_counter() - start)
        return velocity

    @property
    def seconds_run(self) -> float:
        """The seconds of the batches that were run."""
        return sum(sum(times) for times in self.seconds.values())

    def timed(self, total: float) -> Timed:
        """The rollout, which took ``total`` seconds with what surrounds the denoiser, all of which was done."""
        whole = sum(self.seen[rows] * sum(times) / len(times) for rows, times in self.seconds.items())
        return Timed(
            rows=sum(rows * count for rows, count in self.seen.items()),
            rows_run=sum(rows * len(times) for rows, times in self.seconds.items()),
            seconds_run=total,
            seconds=total - self.seconds_run + whole,
        )


def part_of(rows: int, batch: int | None, share: float) -> int:
    """How many of ``rows`` to run so that whole batches of about a share of them are; at least one batch."""
    size = min(batch or rows, rows)
    return min(max(math.ceil(share * math.ceil(rows / size)), 1) * size, rows)


def share_within(seconds: float | None, needed: Sequence[float]) -> float:
    """The share at which phases that would take ``needed`` seconds fit into ``seconds``; 1 where there is no limit."""
    if seconds is None:
        return 1.0
    return min(max(seconds, 0.0) / max(sum(needed), 1e-9), 1.0)
