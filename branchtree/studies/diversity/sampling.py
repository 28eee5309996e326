"""Sets of samples: leaves of trees, and leaves of independent trajectories in groups of the same size.

Axis letters: G groups, K samples of a group, P prompts, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from branchtree.core.noise import NoiseSource, Purpose, generator
from branchtree.core.rollout import Sampler, VelocityFunction, chunks, rollout
from branchtree.core.schedule import Schedule, TreePlan
from branchtree.core.tree import grow
from branchtree.errors import RewardError
from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.values import Condition
from branchtree.recipe.schema import BatchSection
from branchtree.studies.diversity.spaces import NamedSpace
from branchtree.studies.diversity.spread import grouped, pairwise_distance
from branchtree.training import policy as training
from branchtree.training.conditioning import ConditioningCache

Advance = Callable[[int], None]
"""Told how many samples have been made since it was last told."""


@dataclass(frozen=True)
class Kind:
    """How a set's samples are drawn. Sets with different numbers share no noise."""

    name: str
    number: int  # stands in the noises' addresses
    branched: bool = False  # by the recipe's trees; otherwise each sample walks by itself
    shared: bool = True  # samples of a group start from one initial noise


BRANCHED, PLAIN, CONTROL = Kind("branched", 0, branched=True), Kind("plain", 1), Kind("control", 2)
INDEPENDENT = Kind("independent", 3, shared=False)


@dataclass(frozen=True)
class Deal:
    """Which groups a set has: group g is of prompt g % P, so that prompts come equally often, give or take one."""

    groups: int  # G
    size: int  # K
    conditions: Sequence[Condition]  # P
    seed: int
    iteration: int  # of training, which the schedule may depend on

    @property
    def prompt(self) -> Tensor:
        """The prompt of each group, (G,) int64."""
        return torch.arange(self.groups) % len(self.conditions)

    @property
    def samples(self) -> int:
        """G * K."""
        return self.groups * self.size


@dataclass(frozen=True)
class SampledPolicy:
    """A loaded model and how it is rolled out."""

    model: ModelAdapter
    cache: ConditioningCache
    sampler: Sampler
    schedule: Schedule
    batch: BatchSection
    autocast: Callable[[], AbstractContextManager[None]]
    device: torch.device


@dataclass(frozen=True)
class FeatureSamples:
    """What is kept of a set."""

    features: dict[str, Tensor]  # by label (G * K, D) float32, group after group
    latent_distance: Tensor  # (G,) float64, the mean pairwise distance of a group's latents


@torch.no_grad()
def draw_samples(
    policy: SampledPolicy, kind: Kind, deal: Deal, spaces: Sequence[NamedSpace], advance: Advance | None = None
) -> FeatureSamples:
    """Roll out a set, some groups at a time, and keep its features. Raises RewardError for features not finite."""
    policy.cache.prepare(deal.conditions, replace=True)
    parts: dict[str, list[Tensor]] = {named.label: [] for named in spaces}
    distances: list[Tensor] = []
    for span in chunks(deal.groups, policy.batch.rollout_prompts or policy.batch.prompts):
        latents = _leaves(policy, kind, deal, span)
        distances.append(pairwise_distance(grouped(latents.flatten(1), deal.size).cpu()))
        for rows in chunks(len(latents), policy.batch.decode_rows):
            media = policy.model.decode(latents[rows.start : rows.stop])
            for named in spaces:
                parts[named.label].append(_checked(named.space.features(media).float().cpu(), named.label))
        if advance is not None:
            advance(len(latents))
    policy.model.release_frozen()
    return FeatureSamples({label: torch.cat(part) for label, part in parts.items()}, torch.cat(distances))


def _checked(features: Tensor, label: str) -> Tensor:
    if not bool(features.isfinite().all()):
        raise RewardError(f"features '{label}' of some samples are not finite: the model may have made no pictures")
    return features


def _leaves(policy: SampledPolicy, kind: Kind, deal: Deal, span: range) -> Tensor:
    """Clean latents (len(span) * K, *latent) of some groups, group after group."""
    conditions = [deal.conditions[group % len(deal.conditions)] for group in span]
    plans = [policy.schedule.plan(deal.iteration, group) for group in span]
    repeats = 1 if kind.branched else deal.size
    rows = [(group, place) for group in span for place in range(repeats)]
    initial = [_initial(policy.model, kind, deal.seed, group, place) for group, place in rows]
    tree = rollout(
        _for_rows(policy, conditions, repeats),
        policy.sampler,
        grow([plan if kind.branched else unbranched(plan) for plan in plans for _ in range(repeats)]),
        torch.stack(initial).to(policy.device),
        NoiseSource(deal.seed, kind.number),
        [group * repeats + place for group, place in rows],
        max_rows=policy.batch.rollout_rows,
        store=torch.device("cpu") if policy.batch.states == "host" else None,
    )
    return tree.leaves.to(policy.device)


def unbranched(plan: TreePlan) -> TreePlan:
    """The plan of one trajectory with the same stochastic steps."""
    return replace(plan, factors=(1,) * plan.steps)


def _initial(model: ModelAdapter, kind: Kind, seed: int, group: int, place: int) -> Tensor:
    return model.initial_noise(generator(seed, kind.number, group, 0, 0 if kind.shared else place, Purpose.INITIAL))


def _for_rows(policy: SampledPolicy, conditions: Sequence[Condition], repeats: int) -> VelocityFunction:
    """Return the velocity where a rollout's prompts are single samples of groups; a group's encoding is kept once."""
    velocity = training.Policy(policy.model, policy.cache, policy.sampler, policy.autocast, policy.device).under(
        conditions
    )
    return lambda latents, sigma, row: velocity(latents, sigma, row // repeats)
