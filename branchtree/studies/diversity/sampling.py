"""Sets of samples: leaves of trees, and leaves of independent trajectories in groups of the same size.

Axis letters: G groups, K samples of a group, P prompts, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from branchtree.core.noise import NoiseSource
from branchtree.core.rollout import chunks, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.tree import grow
from branchtree.errors import RewardError
from branchtree.plugins.values import Condition
from branchtree.recipe.build import make_sampler, make_schedule
from branchtree.recipe.schema import Recipe
from branchtree.studies.diversity.figures import pairwise_distance
from branchtree.studies.diversity.spaces import NamedSpace
from branchtree.training.policy import Policy


@dataclass(frozen=True)
class Kind:
    """How a set's samples are drawn. Sets with different numbers share no noise."""

    name: str
    number: int  # stands in the noises' addresses
    branched: bool = False  # by the recipe's trees; otherwise each sample has a trajectory of its own
    shared: bool = True  # samples of a group start from one initial noise


BRANCHED, PLAIN, CONTROL = Kind("branched", 0, branched=True), Kind("plain", 1), Kind("control", 2)
INDEPENDENT = Kind("independent", 3, shared=False)


@dataclass(frozen=True)
class GroupLayout:
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
class PlannedSet:
    """A set of samples that is needed."""

    name: str
    kind: Kind
    recipe: Recipe  # its trees and its sampler
    layout: GroupLayout


@dataclass(frozen=True)
class FeatureSamples:
    """What is kept of a set."""

    features: dict[str, Tensor]  # by label (G * K, D) float32, group after group
    latent_distance: Tensor  # (G,) float64, the mean pairwise distance of a group's latents


@torch.no_grad()
def draw_samples(
    policy: Policy, planned: PlannedSet, spaces: Sequence[NamedSpace], advance: Callable[[int], None] | None = None
) -> FeatureSamples:
    """Roll out a set, some groups at a time, and keep its features. Raises RewardError for features not finite.

    ``advance`` is called with the number of samples that have been made since it was last called.
    """
    layout, batch = planned.layout, planned.recipe.batch
    policy = replace(policy, sampler=make_sampler(planned.recipe, policy.model))
    policy.cache.prepare(layout.conditions, replace=True)
    features: dict[str, list[Tensor]] = {named.label: [] for named in spaces}
    distances: list[Tensor] = []
    for span in chunks(layout.groups, batch.rollout_prompts or batch.prompts):
        # A group's prompt is encoded once, for all its trajectories.
        under = policy.under([layout.conditions[group % len(layout.conditions)] for group in span])
        latents = _leaves(under, planned, span)
        encoded = under.encoded([i // layout.size for i in range(len(latents))])
        distances.append(pairwise_distance(latents.flatten(1).unflatten(0, (-1, layout.size)).cpu()))
        for rows in chunks(len(latents), batch.decode_rows):
            taken = slice(rows.start, rows.stop)
            media = encoded[taken].decode(policy.model, latents[taken])
            for named in spaces:
                features[named.label].append(_checked(named.space.features(media).float().cpu(), named.label))
        if advance is not None:
            advance(len(latents))
    policy.model.release_frozen()
    return FeatureSamples({label: torch.cat(found) for label, found in features.items()}, torch.cat(distances))


def _checked(features: Tensor, label: str) -> Tensor:
    if not bool(features.isfinite().all()):
        raise RewardError(f"features '{label}' of some samples are not finite: the model may have made no pictures")
    return features


def _leaves(policy: Policy, planned: PlannedSet, span: range) -> Tensor:
    """Return clean latents (len(span) * K, *latent) of some groups, whose prompts the policy is under, in order."""
    kind, layout, batch = planned.kind, planned.layout, planned.recipe.batch
    schedule = make_schedule(planned.recipe)
    plans = [schedule.plan(layout.iteration, group) for group in span]
    repeats = 1 if kind.branched else layout.size  # trajectories of a group
    rows = [(group, row) for group in span for row in range(repeats)]
    tree = rollout(
        lambda latents, sigma, row: policy(latents, sigma, row // repeats),
        policy.sampler,
        grow([plan if kind.branched else unbranched(plan) for plan in plans for _ in range(repeats)]),
        policy.initial(layout.seed, kind.number, [(group, 0 if kind.shared else row) for group, row in rows]),
        NoiseSource(layout.seed, kind.number),
        [group * repeats + row for group, row in rows],
        max_rows=batch.rollout_rows,
        store=torch.device("cpu") if batch.states == "host" else None,
    )
    return tree.leaves.to(policy.device)


def unbranched(plan: TreePlan) -> TreePlan:
    """Return the plan of one trajectory with the same stochastic steps."""
    return replace(plan, factors=(1,) * plan.steps)
