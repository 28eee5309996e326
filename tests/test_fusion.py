"""Fused values against the recursive reference, and what must hold for any tree."""

from __future__ import annotations

import math
import random

import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Forest, make_plan
from torch import Tensor

from branchtree.core.fusion import NodeValues, PathScale, fuse, path_log_prob
from branchtree.core.tree import grow

scales = st.sampled_from(["mean", "sum", "standardised"])
betas = st.sampled_from([0.0, 0.5, 1.0, 3.0, -1.0])


def fused(forest: Forest, beta: float, scale: PathScale = "mean", dimensions: int = 1) -> NodeValues:
    return fuse(
        forest.topology,
        forest.edge_log_prob,
        forest.reward_tensor,
        forest.valid_tensor,
        beta,
        scale,
        dimensions,
    )


def assert_close(actual: NodeValues, expected: NodeValues) -> None:
    for a, b, c, d in zip(actual.value, expected.value, actual.valid, expected.valid, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert torch.equal(c, d)


@given(strategies.forests(), betas, scales, st.sampled_from([1, 7]))
@strategies.thorough
def test_values_equal_the_reference(forest: Forest, beta: float, scale: PathScale, dimensions: int) -> None:
    roots = forest.nodes()
    reference.fuse_all(roots, beta, scale, dimensions)
    result = fused(forest, beta, scale, dimensions)
    assert all(value.dtype == torch.float64 for value in result.value)
    assert_close(result, strategies.node_values(roots))


@given(strategies.forests())
@strategies.thorough
def test_path_densities_equal_the_reference(forest: Forest) -> None:
    roots = forest.nodes()
    paths = path_log_prob(forest.topology, forest.edge_log_prob)
    for depth in forest.topology.depths:
        nodes = reference.level(roots, depth)
        expected = [reference.path_log_prob(leaf, node) for node in nodes for leaf in reference.leaves(node)]
        assert paths[depth].tolist() == pytest.approx(expected)


@given(strategies.forests(), scales)
@strategies.thorough
def test_beta_0_is_the_mean(forest: Forest, scale: PathScale) -> None:
    result = fused(forest, 0.0, scale, 3)
    for depth in forest.topology.depths:
        for node in reference.level(forest.nodes(), depth):
            rewards = [float(leaf.reward or 0) for leaf in reference.valid_leaves(node)]
            if rewards:
                assert float(result.value[depth][node.place]) == pytest.approx(reference.mean(rewards))


@given(strategies.forests(), betas, scales)
@strategies.thorough
def test_values_lie_within_the_range_of_their_leaves(forest: Forest, beta: float, scale: PathScale) -> None:
    result = fused(forest, beta, scale, 5)
    roots = forest.nodes()
    for depth in forest.topology.depths:
        for node in reference.level(roots, depth):
            rewards = [float(leaf.reward or 0) for leaf in reference.valid_leaves(node)]
            value = float(result.value[depth][node.place])
            if rewards:
                assert min(rewards) - 1e-9 <= value <= max(rewards) + 1e-9
            else:
                assert value == 0 and not bool(result.valid[depth][node.place])


@given(strategies.forests(), st.randoms(use_true_random=False), scales)
@strategies.thorough
def test_prompts_are_independent_and_in_any_order(forest: Forest, shuffler: random.Random, scale: PathScale) -> None:
    chosen = shuffler.sample(range(len(forest.plans)), shuffler.randint(1, len(forest.plans)))
    whole, part = fused(forest, 1.0, scale, 2), fused(forest.take(chosen), 1.0, scale, 2)
    for depth in forest.topology.depths:
        for mine, theirs in ((part.value, whole.value), (part.valid, whole.valid)):
            expected = torch.cat([theirs[depth][list(forest.topology.span(prompt, depth))] for prompt in chosen])
            torch.testing.assert_close(mine[depth], expected, rtol=1e-12, atol=1e-12)


@given(strategies.forests(), st.floats(-3, 3), st.floats(-100, 100), scales)
@strategies.thorough
def test_values_follow_affine_maps_of_the_rewards(
    forest: Forest, slope: float, offset: float, scale: PathScale
) -> None:
    plain = fused(forest, 1.0, scale)
    moved = fused(forest.with_rewards([slope * r + offset for r in forest.rewards]), 1.0, scale)
    for before, after, valid in zip(plain.value, moved.value, plain.valid, strict=True):
        torch.testing.assert_close(after[valid], slope * before[valid] + offset, rtol=1e-9, atol=1e-9)


def two_leaves(first: float, second: float, beta: float, scale: PathScale = "mean", dimensions: int = 1) -> float:
    """Root value of rewards 1 and 0 on two paths whose densities are given."""
    topology = grow([make_plan(2, {0: 2})])
    log_prob = [torch.zeros(1), torch.tensor([first, second]), torch.zeros(2)]
    rewards, valid = torch.tensor([1.0, 0.0]), torch.ones(2, dtype=torch.bool)
    return float(fuse(topology, log_prob, rewards, valid, beta, scale, dimensions).value[0])


def test_worked_weights() -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert two_leaves(-1.0, -1.5, beta=1.0) == pytest.approx(sigmoid(0.5))
    assert two_leaves(-1.0, -1.5, beta=2.0) == pytest.approx(sigmoid(1.0))
    assert two_leaves(-1.0, -1.5, beta=1.0, scale="sum", dimensions=10) == pytest.approx(sigmoid(5.0))
    # Two values standardise to +-1/sqrt(2) whatever their distance.
    assert two_leaves(-1.0, -1.5, beta=1.0, scale="standardised") == pytest.approx(sigmoid(math.sqrt(2)))
    assert two_leaves(-1.0, -1.0, beta=1.0, scale="standardised") == 0.5
    assert two_leaves(-1.0, -1.5, beta=0.0) == 0.5


def test_by_default_the_behaviour_policy_weighs() -> None:
    topology = grow([make_plan(2, {0: 2})])
    log_prob = [torch.zeros(1), torch.tensor([-1.0, -1.5]), torch.zeros(2)]
    rewards, valid = torch.tensor([1.0, 0.0]), torch.ones(2, dtype=torch.bool)
    assert float(fuse(topology, log_prob, rewards, valid).value[0]) == pytest.approx(two_leaves(-1, -1.5, 1.0))


@pytest.mark.parametrize("level", [-1e5, 1e5])
def test_huge_path_densities_do_not_overflow(level: float) -> None:
    """Sums over a million latent dimensions are this large; the softmax depends on differences alone."""
    assert two_leaves(level, level, beta=1.0, scale="sum", dimensions=100) == 0.5
    assert two_leaves(level, level - 1, beta=1.0, scale="sum", dimensions=1000) == 1.0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_masked_reward_never_leaks(poison: float) -> None:
    topology = grow([make_plan(3, {0: 2, 1: 2}), make_plan(3, {0: 2})])
    log_prob = [torch.linspace(-1, 0, topology.width(depth)) for depth in topology.depths]
    valid = torch.tensor([True, False, False, False, True, True])

    def values(masked: float) -> tuple[Tensor, ...]:
        rewards = torch.where(valid, torch.tensor([0.5, 9, 9, 9, 1.0, 2.0]), torch.tensor(masked))
        result = fuse(topology, log_prob, rewards, valid)
        assert [flags.tolist() for flags in result.valid[:2]] == [[True, True], [True, False, True, True]]
        return result.value

    for mine, other in zip(values(poison), values(0.0), strict=True):
        assert bool(mine.isfinite().all())
        assert torch.equal(mine, other)


@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_rewards_is_refused(count: int) -> None:
    topology = grow([make_plan(2, {0: 2})])
    log_prob = [torch.zeros(topology.width(depth)) for depth in topology.depths]
    with pytest.raises(ValueError, match=rf"2 leaves need as many rewards, not \({count},\)"):
        fuse(topology, log_prob, torch.zeros(count), torch.ones(count, dtype=torch.bool))
