"""DanceGRPO, MixGRPO and TempFlow-GRPO for one prompt and one update, a trajectory at a time, by their papers.

Nothing of the library's is used but the model and the noises, which are inputs here. T steps, sigmas from s_0 to s_T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (one sample's latents, sigma) -> velocity


@dataclass(frozen=True)
class Method:
    """What tells the three apart."""

    sde: range  # steps with noise
    level: Callable[[float, float], float]  # g of (sigma, sigma of the next step)
    weights: Sequence[float] | None = None  # of the steps' losses


def moments(velocity: Velocity, x: Tensor, here: float, there: float, g: float) -> tuple[Tensor, float]:
    """Mean and deviation of one step (arXiv 2505.07818, eq. 8; 2505.05470, eq. 9)."""
    v = velocity(x, here)
    score = -(x - (x - here * v) * (1 - here)) / here**2
    return x + (v - 0.5 * g**2 * score) * (there - here), g * math.sqrt(here - there)


def log_density(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Gaussian, averaged over dimensions."""
    return (-((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).mean()


def trajectory(
    velocity: Velocity, x: Tensor, sigmas: Sequence[float], noises: dict[int, Tensor], method: Method
) -> list[Tensor]:
    """All states of one trajectory; ``noises`` by step."""
    states = [x]
    for step, (here, there) in enumerate(pairwise(sigmas)):
        g = method.level(here, there) if step in method.sde else 0.0
        mean, std = moments(velocity, states[-1], here, there, g)
        states.append(mean + std * noises[step] if std else mean)
    return states


def loss(
    velocity: Velocity, paths: Sequence[Sequence[Tensor]], rewards: Tensor, sigmas: Sequence[float], method: Method
) -> Tensor:
    """The first update's loss, whose ratios are 1: advantages over the group, mean over trajectories and SDE steps."""
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-8)).clamp(-5, 5).float()
    terms = []
    for path, advantage in zip(paths, advantages, strict=True):
        for step in method.sde:
            here, there = sigmas[step], sigmas[step + 1]
            mean, std = moments(velocity, path[step], here, there, method.level(here, there))
            new = log_density(path[step + 1], mean, std)
            weight = 1.0 if method.weights is None else method.weights[step]
            terms.append(-weight * advantage * (new - new.detach()).exp())
    return torch.stack(terms).mean()
