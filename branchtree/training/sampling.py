"""Deterministic samples of the current policy from fixed noises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from branchtree.core.noise import NoiseSource, Purpose, generator
from branchtree.core.rollout import Sampler, VelocityFunction, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.transfer import send
from branchtree.core.tree import grow
from branchtree.plugins.protocols import Condition, ModelAdapter
from branchtree.training.microbatch import RowLimit, fitted
from branchtree.training.policy import ConditioningCache, velocity_function


def sample_latents(
    model: ModelAdapter,
    cache: ConditioningCache,
    sampler: Sampler,
    autocast: Callable[[], AbstractContextManager[None]],
    conditions: Sequence[Condition],
    noise_seeds: Sequence[tuple[int, int]],
    seed: int,
    device: torch.device,
    limit: RowLimit,
) -> Tensor:
    """Clean latents (B, *latent) of B conditions along the ODE; each starts from noise addressed by its own pair."""
    initial = torch.stack(
        [model.initial_noise(generator(seed, 0, prompt, 0, draw, Purpose.INITIAL)) for prompt, draw in noise_seeds]
    )
    conditioning = cache.get(conditions, device)
    return denoise(velocity_function(model, conditioning, autocast), sampler, send(initial, device), limit)


def denoise(velocity: VelocityFunction, sampler: Sampler, initial: Tensor, limit: RowLimit) -> Tensor:
    """Clean latents (B, *latent) along the ODE from noises (B, *latent), each under the prompt of its own number."""
    steps, rows = sampler.sigmas.numel() - 1, len(initial)
    plan = TreePlan((1,) * steps, (False,) * steps, (False,) * steps)
    tree = rollout(
        fitted(velocity, limit),
        sampler,
        grow([plan] * rows),
        initial,
        NoiseSource(0, 0),  # nothing is drawn
        range(rows),
        max_rows=limit.rows,
    )
    return tree.leaves
