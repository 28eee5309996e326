"""How far the leaves of a prompt lie apart, measured on their latents: it needs no network and no decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from branchtree.core.noise import Purpose, generator
from branchtree.core.transfer import send

NUMBERS = 4096
"""Numbers of a sample's latents that are compared; of larger latents as many are drawn, always the same."""


def compared_numbers(latents: Tensor) -> Tensor:
    """Return those numbers of some latents (L, *latent) that are compared, (L, M), on the CPU."""
    flat = latents.flatten(1)
    if flat.shape[1] > NUMBERS:
        source = generator(0, 0, 0, 0, 0, Purpose.PERMUTATION)
        chosen = torch.randint(flat.shape[1], (NUMBERS,), generator=source)
        flat = flat[:, send(chosen, flat.device)]
    return flat.cpu()


def group_spread(numbers: Tensor, root: Tensor, prompts: int) -> list[float | None]:
    """Return how far the leaves of each of ``prompts`` prompts lie apart; None for a prompt with a single leaf.

    ``numbers`` (L, M) are the leaves' and ``root`` (L,) says whose they are. The spread is the root mean square of
    their sample deviations; of integers, the fraction of the numbers in which two leaves differ.
    """
    groups = [numbers[root == prompt] for prompt in range(prompts)]
    return [_spread(group) if len(group) > 1 else None for group in groups]


def _spread(group: Tensor) -> float:
    if group.is_floating_point():
        return float(group.double().var(dim=0).mean().sqrt())
    leaves = len(group)
    differing = sum(int((group[lag:] != group[:-lag]).sum()) for lag in range(1, leaves))
    return differing / (leaves * (leaves - 1) / 2 * group.shape[1])
