"""Nested analysis of variance against explicit loops, and on trees whose components are known."""

from __future__ import annotations

import random

import pytest
import reference
import strategies
import torch
from hypothesis import assume, given
from strategies import Forest, make_plan
from torch import Tensor

from branchtree.core.schedule import PRESET_SPLITS, TreePlan
from branchtree.core.tree import Topology, grow
from branchtree.core.variance import SplitVariance, split_variance

DENSE = make_plan(20, dict.fromkeys(PRESET_SPLITS["dense"], 2))


@given(strategies.forests(ties=False))
@strategies.thorough
def test_any_design_equals_the_reference(forest: Forest) -> None:
    """Ragged over prompts and unbalanced by masked leaves, whose rewards are NaN or infinite here."""
    assume(any(plan.splits for plan in forest.plans))
    result = split_variance(forest.topology, forest.reward_tensor, forest.valid_tensor)
    expected = reference.split_variance(forest.nodes())
    assert (result is None) == (expected is None)
    if result is None or expected is None:
        return
    assert result.share.tolist() == pytest.approx(expected.share, abs=1e-9)
    assert result.independent_share.tolist() == pytest.approx(expected.independent_share)
    assert result.component.tolist() == pytest.approx(expected.component, rel=1e-6, abs=1e-9)


@given(strategies.forests(ties=False))
@strategies.thorough
def test_shares_sum_to_1(forest: Forest) -> None:
    result = split_variance(forest.topology, forest.reward_tensor, forest.valid_tensor)
    assume(result is not None)
    assert result is not None
    for parts in (result.share, result.independent_share, result.component):
        assert float(parts.sum()) == pytest.approx(1)
    assert float(result.share.min()) >= 0


def test_degrees_of_freedom_of_dense() -> None:
    result = split_variance(grow([DENSE]), torch.arange(16.0), torch.ones(16, dtype=torch.bool))
    assert result is not None
    assert result.independent_share.tolist() == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])
    assert [round(share, 3) for share in result.independent_share.tolist()] == [0.067, 0.133, 0.267, 0.533]


def simulated(
    plan: TreePlan, prompts: int, deviations: list[float], seed: int, independent: bool = False
) -> tuple[Topology, Tensor]:
    """Rewards made of one normal effect per node below each split, beside an effect of the prompt."""
    topology = grow([plan] * prompts)
    generator = torch.Generator().manual_seed(seed)

    def effects(depth: int) -> Tensor:
        drawn = torch.randn(topology.width(depth), generator=generator, dtype=torch.float64)
        return drawn[topology.ancestor[depth]]

    rewards = 3 * effects(0)
    for step, deviation in zip(plan.splits, deviations, strict=True):
        rewards = rewards + deviation * effects(plan.steps if independent else step + 1)
    return topology, rewards


def decompose(topology: Topology, rewards: Tensor, valid: Tensor | None = None) -> SplitVariance:
    everyone = torch.ones(rewards.numel(), dtype=torch.bool)
    result = split_variance(topology, rewards, everyone if valid is None else valid)
    assert result is not None
    return result


COMPONENTS = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("masked", [0.0, 0.4], ids=["balanced", "masked"])
def test_planted_components_are_recovered(masked: float) -> None:
    """2,000 trees. The first split has one degree of freedom in each: its component is known to about 3%."""
    topology, rewards = simulated(DENSE, 2000, [part**0.5 for part in COMPONENTS], seed=5)
    valid = torch.rand(rewards.numel(), generator=torch.Generator().manual_seed(6)) >= masked
    result = decompose(topology, rewards.where(valid, torch.tensor(torch.nan)), valid)
    assert result.component.tolist() == pytest.approx(COMPONENTS, abs=0.03)


def test_independent_leaves_put_all_variance_at_the_last_split() -> None:
    """Their sums of squares still spread over the splits, by degrees of freedom: what the second figure is for."""
    topology, rewards = simulated(DENSE, 2000, [1.0] * 4, seed=7, independent=True)
    result = decompose(topology, rewards)
    assert result.component.tolist() == pytest.approx([0, 0, 0, 1], abs=0.02)
    assert result.share.tolist() == pytest.approx(result.independent_share.tolist(), abs=0.01)


def test_worked_shares() -> None:
    """Four leaves 0, 2, 6, 8: pairs differ from the mean by 3 (4 * 9), leaves from their pair by 1 (4 * 1)."""
    topology = grow([make_plan(3, {0: 2, 1: 2})])
    result = decompose(topology, torch.tensor([0.0, 2.0, 6.0, 8.0]))
    assert result.share.tolist() == pytest.approx([0.9, 0.1])
    assert result.independent_share.tolist() == pytest.approx([1 / 3, 2 / 3])
    # Mean squares 36 and 2; E of the first is v2 + 2 * v1.
    assert result.component.tolist() == pytest.approx([17 / 19, 2 / 19])


def test_prompts_are_pooled_and_their_means_do_not_matter() -> None:
    plan = make_plan(3, {0: 2, 1: 2})
    topology = grow([plan, plan])
    rewards = torch.tensor([0.0, 2.0, 6.0, 8.0])
    alone = decompose(grow([plan]), rewards)
    pooled = decompose(topology, torch.cat([rewards, rewards + 100]))
    torch.testing.assert_close(pooled.share, alone.share)
    torch.testing.assert_close(pooled.component, alone.component)


def test_a_prompt_without_a_valid_leaf_takes_no_part() -> None:
    plan = make_plan(3, {0: 2, 1: 2})
    rewards = torch.tensor([0.0, 2.0, 6.0, 8.0])
    valid = torch.tensor([True] * 4 + [False] * 4)
    with_empty = decompose(grow([plan, plan]), torch.cat([rewards, torch.full((4,), torch.nan)]), valid)
    torch.testing.assert_close(with_empty.component, decompose(grow([plan]), rewards).component)


def test_there_is_nothing_to_decompose_without_splits() -> None:
    assert split_variance(grow([make_plan(3, {})]), torch.ones(1), torch.ones(1, dtype=torch.bool)) is None


@pytest.mark.parametrize("reward", [0.0, 0.5, 0.1, 1e6 + 1 / 3])
def test_there_is_nothing_to_decompose_without_variance(reward: float) -> None:
    """Means of equal rewards differ from them by rounding, which is no variance."""
    topology = grow([make_plan(4, {0: 3, 1: 3})] * 3)
    rewards = torch.full((27,), reward, dtype=torch.float64)
    assert split_variance(topology, rewards, torch.ones(27, dtype=torch.bool)) is None


def test_no_valid_leaf_gives_nothing() -> None:
    topology = grow([DENSE])
    assert split_variance(topology, torch.zeros(16), torch.zeros(16, dtype=torch.bool)) is None


def test_leaf_order_within_a_prompt_follows_the_tree() -> None:
    """Shuffled rewards have the shares of independent leaves on average; those of a tree do not."""
    topology, rewards = simulated(DENSE, 200, [1.0, 0.0, 0.0, 0.1], seed=9)
    planted = decompose(topology, rewards).share
    order = list(range(16))
    random.Random(1).shuffle(order)
    shuffled = decompose(topology, rewards.view(200, 16)[:, order].flatten()).share
    assert float(planted[0]) > 0.9 > float(shuffled[0])
