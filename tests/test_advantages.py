"""The three advantage estimators against the recursive reference, and what must hold for any tree."""

from __future__ import annotations

import math
import random

import pytest
import reference
import strategies
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Forest, make_plan
from torch import Tensor

from branchtree.core.advantages import ESTIMATORS, Advantages
from branchtree.core.fusion import NodeValues, fuse
from branchtree.core.tree import grow

names = st.sampled_from(["depth", "leaf", "sibling"])


def estimated(forest: Forest, name: str, beta: float = 1.0, eps: float = 1e-8) -> Advantages:
    values = fuse(forest.topology, forest.edge_log_prob, forest.reward_tensor, forest.valid_tensor, beta)
    return ESTIMATORS[name](forest.topology, values, eps)


@given(strategies.forests(), names, st.sampled_from([0.0, 1.0]), st.sampled_from([1e-8, 1e-4, 0.1]))
@strategies.thorough
def test_advantages_equal_the_reference(forest: Forest, name: str, beta: float, eps: float) -> None:
    """The values come from the reference too, so that only the estimator is on trial."""
    roots = forest.nodes()
    reference.fuse_all(roots, beta)
    reference.assign_advantages(roots, name, eps)
    result = ESTIMATORS[name](forest.topology, strategies.node_values(roots), eps)
    for depth in forest.topology.depths:
        expected = [node.advantage for node in reference.level(roots, depth)]
        assert result[depth].dtype == torch.float64
        assert result[depth].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        # Zero is exact: an edge of advantage 0 is left out of the gradient pass.
        assert (result[depth] == 0).tolist() == [abs(number) < 1e-9 for number in expected]


@given(strategies.forests(ties=False))
@strategies.thorough
def test_depth_advantages_are_standardised(forest: Forest) -> None:
    result = estimated(forest, "depth")
    roots = forest.nodes()
    for depth in forest.topology.depths:
        for prompt in range(len(roots)):
            peers = [n for n in reference.level([roots[prompt]], depth) if reference.valid_leaves(n)]
            numbers = [float(result[depth][node.place]) for node in peers]
            if len(numbers) < 2:
                assert all(number == 0 for number in numbers)
            else:
                assert reference.mean(numbers) == pytest.approx(0, abs=1e-6)
                assert reference.sample_std(numbers) == pytest.approx(1, rel=1e-3)


@given(strategies.forests(ties=False), st.sampled_from([0.01, 0.5, 7.0]), st.floats(-50, 50), names)
@strategies.thorough
def test_affine_maps_of_the_rewards_change_nothing(forest: Forest, slope: float, offset: float, name: str) -> None:
    moved = forest.with_rewards([slope * reward + offset for reward in forest.rewards])
    for before, after in zip(estimated(forest, name), estimated(moved, name), strict=True):
        torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)


@given(strategies.forests(ties=False), names)
@strategies.thorough
def test_negated_rewards_negate_advantages(forest: Forest, name: str) -> None:
    negated = forest.with_rewards([-reward for reward in forest.rewards])
    for before, after in zip(estimated(forest, name), estimated(negated, name), strict=True):
        torch.testing.assert_close(before, -after, rtol=1e-6, atol=1e-6)


@given(strategies.forests(), st.randoms(use_true_random=False), names)
@strategies.thorough
def test_prompts_are_independent_and_in_any_order(forest: Forest, shuffler: random.Random, name: str) -> None:
    chosen = shuffler.sample(range(len(forest.plans)), shuffler.randint(1, len(forest.plans)))
    whole, part = estimated(forest, name), estimated(forest.take(chosen), name)
    for depth in forest.topology.depths:
        expected = torch.cat([whole[depth][list(forest.topology.span(prompt, depth))] for prompt in chosen])
        torch.testing.assert_close(part[depth], expected, rtol=1e-6, atol=1e-6)


@given(strategies.forests(), names)
@strategies.thorough
def test_masked_leaves_and_their_own_edges_get_nothing(forest: Forest, name: str) -> None:
    """Rewards of masked leaves are NaN or infinite here."""
    result = estimated(forest, name)
    roots = forest.nodes()
    for depth in forest.topology.depths:
        assert bool(result[depth].isfinite().all())
        for node in reference.level(roots, depth):
            if not reference.valid_leaves(node):
                assert float(result[depth][node.place]) == 0


@given(strategies.forests(), names, st.sampled_from([0.1, 1 / 3, 1e6 + 0.1]))
@strategies.thorough
def test_equal_rewards_give_exactly_nothing(forest: Forest, name: str, reward: float) -> None:
    """Weighted means of equal rewards differ by rounding; divided by a rounding deviation they would be +-1."""
    equal = forest.with_rewards([reward] * len(forest.rewards))
    assume(any(forest.valid))
    for level in estimated(equal, name):
        assert torch.equal(level, torch.zeros_like(level))


def tree_of_four(*rewards: float, valid: tuple[bool, ...] = (True,) * 4) -> tuple[Tensor, ...]:
    """Depth advantages of two splits in two; the path densities are equal."""
    return named("depth", *rewards, valid=valid)


def named(name: str, *rewards: float, valid: tuple[bool, ...] = (True,) * 4) -> tuple[Tensor, ...]:
    topology = grow([make_plan(3, {0: 2, 1: 2})])
    log_prob = [torch.zeros(topology.width(depth)) for depth in topology.depths]
    values = fuse(topology, log_prob, torch.tensor(rewards), torch.tensor(valid))
    return ESTIMATORS[name](topology, values, 1e-8)


def test_worked_depth_advantages() -> None:
    levels = tree_of_four(1.0, 3.0, 5.0, 7.0)
    assert levels[0].tolist() == [0]
    # Values 2 and 6: two nodes always give +-0.707.
    assert levels[1].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    std = math.sqrt(20 / 3)
    assert levels[2].tolist() == pytest.approx([-3 / std, -1 / std, 1 / std, 3 / std])
    assert levels[3].tolist() == levels[2].tolist()


def test_worked_leaf_advantages() -> None:
    levels = named("leaf", 1.0, 3.0, 5.0, 7.0)
    std = math.sqrt(20 / 3)
    assert levels[0].tolist() == [0]
    assert levels[1].tolist() == pytest.approx([(2 - 6) / std, (6 - 2) / std])
    assert levels[3].tolist() == pytest.approx([(1 - 5) / std, (3 - 13 / 3) / std, (5 - 11 / 3) / std, 4 / std])


def test_worked_sibling_advantages() -> None:
    levels = named("sibling", 1.0, 3.0, 5.0, 7.0)
    std = math.sqrt(20 / 3)
    assert levels[1].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    assert levels[2].tolist() == pytest.approx([-1 / std, 1 / std, -1 / std, 1 / std])
    assert levels[3].tolist() == [0, 0, 0, 0]  # only children


def test_a_masked_leaf_takes_no_part() -> None:
    levels = tree_of_four(1.0, math.nan, 5.0, 6.0, valid=(True, False, True, True))
    std = math.sqrt(((1 - 4) ** 2 + (5 - 4) ** 2 + (6 - 4) ** 2) / 2)
    assert levels[2].tolist() == pytest.approx([-3 / std, 0, 1 / std, 2 / std])


@pytest.mark.parametrize("name", ["depth", "leaf", "sibling"])
def test_one_valid_leaf_or_none_has_nothing_to_compare_with(name: str) -> None:
    for valid in ((False, True, False, False), (False,) * 4):
        for level in named(name, 1.0, 2.0, 3.0, 4.0, valid=valid):
            assert torch.equal(level, torch.zeros_like(level))


@pytest.mark.parametrize("name", ["depth", "leaf", "sibling"])
def test_small_but_real_spread_counts(name: str) -> None:
    """Rewards that differ in the fifth digit are not ties."""
    assert float(named(name, 1.0, 1.00001, 1.0, 1.0)[2].abs().max()) > 0.5


@given(
    forest=strategies.forests(),
    name=names,
    size=st.floats(1e-3, 1e3).map(lambda size: float(torch.tensor(size))),
    shuffler=st.randoms(use_true_random=False),
)
@strategies.thorough
def test_a_spread_of_rounding_is_a_tie(forest: Forest, name: str, size: float, shuffler: random.Random) -> None:
    """Scores that are neighbours in float32 are one score with rounding, whatever their size, at every depth."""
    last = float(torch.nextafter(torch.tensor(size), torch.tensor(math.inf)))
    close = forest.with_rewards([shuffler.choice([-size, -last]) for _ in forest.rewards])
    for level in estimated(close, name):
        assert torch.equal(level, torch.zeros_like(level))


@pytest.mark.parametrize("name", ["depth", "leaf", "sibling"])
def test_scores_around_zero_are_held_to_their_own_size(name: str) -> None:
    """Small scores are no ties: the bound is relative."""
    assert float(named(name, 1e-5, 2e-5, -1e-5, 0.0)[2].abs().max()) > 0.3


@pytest.mark.parametrize("name", ["depth", "sibling"])
def test_means_that_only_rounding_tells_apart_are_a_tie(name: str) -> None:
    """Leaves far apart, whose means are 0 but for float32: the size is the leaves', not that of the means."""
    above, below = 0.7, float(torch.nextafter(torch.tensor(-0.7), torch.tensor(0.0)))
    levels = named(name, above, -0.7, above, below)
    assert levels[1].tolist() == [0, 0]
    assert levels[2].abs().min() > 0.5


def test_siblings_that_tie_have_no_advantage_among_others_that_do_not() -> None:
    close = float(torch.nextafter(torch.tensor(0.3), torch.tensor(1.0)))
    assert named("sibling", 0.3, close, 0.9, 0.1)[2][:2].tolist() == [0, 0]


def test_values_of_no_node_are_no_error() -> None:
    topology = grow([make_plan(2, {})])
    nothing = NodeValues((torch.zeros(1).double(),) * 3, (torch.zeros(1, dtype=torch.bool),) * 3)
    for estimator in ESTIMATORS.values():
        assert [level.tolist() for level in estimator(topology, nothing, 1e-8)] == [[0], [0], [0]]
