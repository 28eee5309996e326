"""Random ragged forests for property tests.

Shapes are drawn by hypothesis, so that a failure shrinks to a small tree; the many numbers on a shape come from a
drawn seed, which is much faster than drawing each.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import reference
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from reference import Node
from torch import Tensor

from branchtree.core.fusion import NodeValues
from branchtree.core.schedule import TreePlan
from branchtree.core.tree import Topology, grow

thorough = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
"""Every run draws the same examples, and writes nothing."""

MOST_LEAVES = 36
"""Per prompt: two splits of any factors, or three of most."""


@dataclass(frozen=True)
class Forest:
    """Some prompts' trees with everything that credit needs to know of them."""

    plans: tuple[TreePlan, ...]
    log_prob: tuple[tuple[float, ...], ...]  # per depth, of the edge into each node
    rewards: tuple[float, ...]  # per leaf
    valid: tuple[bool, ...]  # per leaf

    @cached_property
    def topology(self) -> Topology:
        return grow(self.plans)

    @property
    def edge_log_prob(self) -> list[Tensor]:
        return [torch.tensor(level) for level in self.log_prob]

    @property
    def reward_tensor(self) -> Tensor:
        """Rewards, with values in the masked places that would spoil every sum they entered."""
        poison = [math.nan, math.inf, -math.inf]
        return torch.tensor(
            [
                reward if valid else poison[leaf % 3]
                for leaf, (reward, valid) in enumerate(zip(self.rewards, self.valid, strict=True))
            ],
            dtype=torch.float64,
        )

    @property
    def valid_tensor(self) -> Tensor:
        return torch.tensor(self.valid)

    def nodes(self) -> list[Node]:
        """The same forest as linked nodes: the prompts' roots."""
        roots = [
            reference.plant(prompt, plan.factors, plan.stochastic, plan.trained)
            for prompt, plan in enumerate(self.plans)
        ]
        reference.number(roots)
        for depth, level in enumerate(self.log_prob):
            for node, log_prob in zip(reference.level(roots, depth), level, strict=True):
                node.log_prob = log_prob
        for leaf, reward, valid in zip(
            reference.level(roots, len(self.log_prob) - 1), self.rewards, self.valid, strict=True
        ):
            leaf.reward = reward if valid else None
        return roots

    def take(self, prompts: Sequence[int]) -> Forest:
        """Some of the prompts, in the given order."""
        topology = self.topology
        spans = [[topology.span(prompt, depth) for depth in topology.depths] for prompt in prompts]
        return Forest(
            plans=tuple(self.plans[prompt] for prompt in prompts),
            log_prob=tuple(
                tuple(level[node] for span in spans for node in span[depth])
                for depth, level in enumerate(self.log_prob)
            ),
            rewards=tuple(self.rewards[leaf] for span in spans for leaf in span[-1]),
            valid=tuple(self.valid[leaf] for span in spans for leaf in span[-1]),
        )

    def with_rewards(self, rewards: Sequence[float]) -> Forest:
        return replace(self, rewards=tuple(rewards))


def node_values(roots: Sequence[Node]) -> NodeValues:
    """The reference's values in the library's form."""
    levels = [reference.level(roots, depth) for depth in range(reference.height(roots[0]) + 1)]
    return NodeValues(
        value=tuple(torch.tensor([node.value or 0.0 for node in level], dtype=torch.float64) for level in levels),
        valid=tuple(torch.tensor([node.value is not None for node in level]) for level in levels),
    )


def make_plan(
    steps: int,
    splits: dict[int, int],
    stochastic: Sequence[int] | None = None,
    trained: Sequence[int] | None = None,
) -> TreePlan:
    """A plan from its splits {step: factor} and its further stochastic steps (by default all but the last)."""
    chosen = set(range(steps - 1) if stochastic is None else stochastic) | set(splits)
    random_steps = tuple(step in chosen for step in range(steps))
    return TreePlan(
        factors=tuple(splits.get(step, 1) for step in range(steps)),
        stochastic=random_steps,
        trained=random_steps if trained is None else tuple(step in trained for step in range(steps)),
    )


@st.composite
def plans(draw: st.DrawFn, steps: int) -> TreePlan:
    splits = draw(st.lists(st.integers(0, steps - 2), max_size=3, unique=True))
    factors = {}
    for step in splits:
        factor = draw(st.integers(2, 4))
        if math.prod(factors.values()) * factor <= MOST_LEAVES:
            factors[step] = factor
    further = [step for step in range(steps - 1) if draw(st.booleans())]
    untrained = [step for step in range(steps - 1) if draw(st.integers(0, 4)) == 0]
    stochastic = set(further) | set(factors)
    return make_plan(steps, factors, further, sorted(stochastic - set(untrained)))


@st.composite
def batches(draw: st.DrawFn) -> tuple[TreePlan, ...]:
    """1 to 4 prompts' plans on one grid of 2 to 8 steps, each with its own splits."""
    steps = draw(st.integers(2, 8))
    return tuple(draw(st.lists(plans(steps), min_size=1, max_size=4)))


@st.composite
def forests(draw: st.DrawFn, ties: bool | None = None) -> Forest:
    """Forests with ties among the rewards (or without, or either) and with masked leaves."""
    drawn = draw(batches())
    numbers = random.Random(draw(st.integers(0, 2**32 - 1)))
    few = draw(st.booleans()) if ties is None else ties
    masked = draw(st.sampled_from([0.0, 0.0, 0.2, 0.7]))
    skipped = draw(st.integers(0, 7))  # a whole prompt without a valid leaf, if there is one of this number
    log_prob = [[0.0] * len(drawn)]
    for step in range(drawn[0].steps):
        # Eighths are exact in float32 and add up exactly, so that equal paths tie exactly in both readings.
        log_prob.append(
            [
                numbers.randrange(-32, 16) / 8 if plan.stochastic[step] else 0.0
                for plan in drawn
                for _ in range(plan.widths[step + 1])
            ]
        )
    leaf_prompt = [prompt for prompt, plan in enumerate(drawn) for _ in range(plan.leaves)]
    return Forest(
        plans=drawn,
        log_prob=tuple(tuple(level) for level in log_prob),
        rewards=tuple(numbers.randrange(3) / 2 if few else numbers.gauss(0.3, 1.0) for _ in range(len(leaf_prompt))),
        valid=tuple(prompt != skipped and numbers.random() >= masked for prompt in leaf_prompt),
    )
