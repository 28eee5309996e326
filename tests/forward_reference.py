"""Forward objectives as their papers state them, one noised sample at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float, int], Tensor]
"""(one state, its noise level, its prompt) -> what the model predicts."""


@dataclass(frozen=True)
class Row:
    """A sample and one of its draws."""

    clean: Tensor
    noise: Tensor
    sigma: float
    prompt: int
    advantage: float
    group: Hashable  # what it is compared with under a centred loss


@dataclass(frozen=True)
class Keys:
    """The keys of ``loss`` that matter."""

    kind: str
    error: str = "velocity"
    weight: int = 0  # power of the noise level
    beta: float = 1.0
    spread: float = 5.0
    clip: float = 1e-4
    prediction: str = "velocity"


def noised(row: Row, prediction: str) -> tuple[Tensor, Tensor]:
    """The state and the target."""
    if prediction == "velocity":
        return (1 - row.sigma) * row.clean + row.sigma * row.noise, row.noise - row.clean
    alpha = math.sqrt(1 - row.sigma**2)
    target = row.noise if prediction == "noise" else alpha * row.noise - row.sigma * row.clean
    return alpha * row.clean + row.sigma * row.noise, target


def clean_sample(state: Tensor, guess: Tensor, sigma: float, prediction: str) -> Tensor:
    """The clean sample that a prediction implies."""
    alpha = math.sqrt(1 - sigma**2)
    if prediction == "velocity":
        return state - sigma * guess
    return (state - sigma * guess) / alpha if prediction == "noise" else alpha * state - sigma * guess


def error(row: Row, guess: Tensor, keys: Keys) -> Tensor:
    """A prediction's error."""
    state, target = noised(row, keys.prediction)
    if keys.error == "velocity":
        return ((guess - target) ** 2).mean() * row.sigma**keys.weight
    apart = clean_sample(state, guess, row.sigma, keys.prediction) - row.clean
    return (apart**2).mean() / max(float(apart.detach().abs().mean()), 1e-5) * row.sigma**keys.weight


def loss(rows: Sequence[Row], new: Velocity, old: Velocity, keys: Keys) -> list[Tensor]:
    """The loss of each row; groups are the rows that are given."""
    states = [noised(row, keys.prediction)[0] for row in rows]
    predicted = [new(state, row.sigma, row.prompt) for state, row in zip(states, rows, strict=True)]
    before = [old(state, row.sigma, row.prompt).detach() for state, row in zip(states, rows, strict=True)]
    if keys.kind == "nft":
        return [nft(row, v, o, keys) for row, v, o in zip(rows, predicted, before, strict=True)]
    if keys.kind in {"awm", "vgrpo"}:
        return [matching(row, v, o, keys) for row, v, o in zip(rows, predicted, before, strict=True)]
    implied = [error(row, o, keys) - error(row, v, keys) for row, v, o in zip(rows, predicted, before, strict=True)]
    losses = []
    for row, own in zip(rows, implied, strict=True):
        group = [i for i, other in enumerate(rows) if other.group == row.group]
        centre = torch.stack([implied[i] for i in group]).mean()
        reward = row.advantage - sum(rows[i].advantage for i in group) / len(group)
        losses.append((keys.beta * (own - centre) - reward) ** 2)
    return losses


def nft(row: Row, v: Tensor, old: Tensor, keys: Keys) -> Tensor:
    """DiffusionNFT."""
    wanted = 0.5 + 0.5 * min(max(row.advantage / keys.spread, -1), 1)
    better = (1 - keys.beta) * old + keys.beta * v
    worse = (1 + keys.beta) * old - keys.beta * v
    return wanted * error(row, better, keys) + (1 - wanted) * error(row, worse, keys)


def matching(row: Row, v: Tensor, old: Tensor, keys: Keys) -> Tensor:
    """Advantage-weighted matching, and V-GRPO."""
    ratio = torch.exp(error(row, old, keys) - error(row, v, keys))
    held = ratio.clamp(1 - keys.clip, 1 + keys.clip)
    return -torch.minimum(ratio * row.advantage, held * row.advantage)


def flow_policy_loss(rows: Sequence[Row], new: Velocity, old: Velocity, clip: float, average: bool) -> Tensor:
    """Flow policy optimisation's loss of one sample, whose draws are the rows (arXiv 2507.21053).

    Its ratio is exp(CFM_old - CFM_new), of the matching losses averaged over the draws, or each draw has a ratio.
    """
    difference = []
    for row in rows:
        state, velocity = row.sigma * row.noise + (1 - row.sigma) * row.clean, row.noise - row.clean
        before, after = (((each(state, row.sigma, row.prompt) - velocity) ** 2).mean() for each in (old, new))
        difference.append(before.detach() - after)
    if average:
        difference = [sum(difference, start=torch.zeros(())) / len(rows)]
    objective = torch.zeros((), dtype=torch.float64)
    for each in difference:
        ratio = torch.exp(each)
        held = ratio.clamp(1 - clip, 1 + clip)
        objective = objective + torch.minimum(ratio * rows[0].advantage, held * rows[0].advantage)
    return -objective / len(difference)
