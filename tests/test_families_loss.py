"""Trained edges by parent, the states they need, and the clipped loss."""

from __future__ import annotations

import math
import random

import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Node
from strategies import Forest, make_plan
from torch import Tensor

from branchtree.core.advantages import Advantages
from branchtree.core.families import Families, collect_families, gather, trained_edges
from branchtree.core.gaussian import GaussianTransition
from branchtree.core.loss import Edges, clipped_loss, plain_ratio, silenced
from branchtree.core.pruning import EdgeMask, trainable_edges
from branchtree.core.tree import BranchTree, Topology, grow


def credited(forest: Forest, seed: int, sparsity: float) -> tuple[list[Node], Advantages, EdgeMask]:
    """Random advantages, some of them 0, and a random mask within the plan's trained edges."""
    numbers = random.Random(seed)
    roots = forest.nodes()
    advantages, keep = [], []
    for depth in forest.topology.depths:
        nodes = reference.level(roots, depth)
        for node in nodes:
            node.advantage = 0.0 if numbers.random() < sparsity else numbers.choice([-1.5, -0.25, 0.5, 2.0])
        advantages.append(torch.tensor([node.advantage for node in nodes], dtype=torch.float64))
        keep.append(torch.tensor([node.trained and numbers.random() < 0.7 for node in nodes]))
    return roots, tuple(advantages), tuple(keep)


def expected_families(roots: list[Node], keep: EdgeMask) -> list[tuple[Node, list[Node]]]:
    return reference.families(roots, lambda node: bool(keep[node.depth][node.place]))


def assert_families(families: Families, expected: list[tuple[Node, list[Node]]]) -> None:
    assert len(families) == len(expected)
    assert families.edges == sum(len(children) for _, children in expected)
    assert families.depth.tolist() == [parent.depth for parent, _ in expected]
    assert families.parent.tolist() == [parent.place for parent, _ in expected]
    assert families.prompt.tolist() == [parent.prompt for parent, _ in expected]
    assert families.family.tolist() == [i for i, (_, children) in enumerate(expected) for _ in children]
    assert families.child.tolist() == [child.place for _, children in expected for child in children]
    assert families.advantage.tolist() == [child.advantage for _, children in expected for child in children]
    assert families.edge_depth.tolist() == [child.depth for _, children in expected for child in children]
    assert families.advantage.dtype == torch.float32


cases = (strategies.forests(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.9, 1.0]))


@given(*cases)
@strategies.thorough
def test_families_equal_the_reference(forest: Forest, seed: int, sparsity: float) -> None:
    roots, advantages, keep = credited(forest, seed, sparsity)
    assert_families(collect_families(forest.topology, advantages, keep), expected_families(roots, keep))


@given(*cases)
@strategies.thorough
def test_under_a_kl_all_kept_edges_are_gathered(forest: Forest, seed: int, sparsity: float) -> None:
    """Those without an advantage too, with advantage 0; pruned ones stay out."""
    roots, advantages, keep = credited(forest, seed, sparsity)
    for depth in forest.topology.depths:  # the reference trains only stochastic edges; so does a mask of a real tree
        stochastic = torch.tensor([node.stochastic for node in reference.level(roots, depth)])
        assert not bool((keep[depth] & ~stochastic).any())
    expected = reference.families(roots, lambda node: bool(keep[node.depth][node.place]), kl=True)
    assert_families(collect_families(forest.topology, advantages, keep, regularised=True), expected)


@given(*cases)
@strategies.thorough
def test_a_selection_keeps_each_family_whole(forest: Forest, seed: int, sparsity: float) -> None:
    roots, advantages, keep = credited(forest, seed, sparsity)
    expected = expected_families(roots, keep)
    chosen = [i for i in range(len(expected)) if random.Random(seed + i).random() < 0.5]
    families = collect_families(forest.topology, advantages, keep).select(torch.tensor(chosen, dtype=torch.int64))
    assert_families(families, [expected[i] for i in chosen])


@given(*cases)
@strategies.thorough
def test_trained_edges_have_an_advantage(forest: Forest, seed: int, sparsity: float) -> None:
    roots, advantages, keep = credited(forest, seed, sparsity)
    chosen = reference.trained_edges(roots, lambda node: bool(keep[node.depth][node.place]))
    for depth, flags in enumerate(trained_edges(forest.topology, advantages, keep)):
        places = [node.place for node in chosen if node.depth == depth]
        assert torch.nonzero(flags)[:, 0].tolist() == places


def labelled(topology: Topology) -> BranchTree:
    """States and densities that name their own node: 1000 * depth + place."""
    names = [1000.0 * depth + torch.arange(topology.width(depth)) for depth in topology.depths]
    return BranchTree(
        topology,
        torch.linspace(1, 0, topology.steps + 1),
        tuple(name.view(-1, 1, 1).expand(-1, 2, 3) for name in names),
        tuple(-name for name in names),
    )


@given(*cases)
@strategies.thorough
def test_gathered_states_belong_to_their_nodes(forest: Forest, seed: int, sparsity: float) -> None:
    _, advantages, keep = credited(forest, seed, sparsity)
    tree = labelled(forest.topology)
    families = collect_families(forest.topology, advantages, keep)
    if len(families) == 0:
        return
    batch = gather(tree, families, torch.device("cpu"))
    parents = 1000.0 * families.depth + families.parent
    children = 1000.0 * families.edge_depth + families.child
    assert torch.equal(batch.latents, parents.view(-1, 1, 1).expand(-1, 2, 3))
    assert torch.equal(batch.following, children.view(-1, 1, 1).expand(-1, 2, 3))
    assert torch.equal(batch.log_prob, -children)
    assert torch.equal(batch.sigma, tree.sigmas[families.depth])
    assert torch.equal(batch.family, families.family)
    assert torch.equal(batch.advantage, families.advantage)


def test_siblings_share_one_forward() -> None:
    topology = grow([make_plan(3, {0: 4})])
    ones = tuple(torch.ones(topology.width(depth)).double() for depth in topology.depths)
    families = collect_families(topology, ones, trainable_edges(topology))
    assert (len(families), families.edges) == (1 + 4, 4 + 4)
    assert families.family.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


def test_no_trained_edge_is_no_family() -> None:
    topology = grow([make_plan(3, {0: 4})])
    zeros = tuple(torch.zeros(topology.width(depth)).double() for depth in topology.depths)
    families = collect_families(topology, zeros, trainable_edges(topology))
    assert (len(families), families.edges) == (0, 0)
    assert families.advantage.dtype == torch.float32 and families.child.dtype == torch.int64


# The loss.


def probability_ratio(new: Tensor, old: Tensor) -> Tensor:
    """Of edges of which nothing else is looked at."""
    nothing = torch.zeros(len(new), 1)
    return plain_ratio(Edges(torch.ones_like(new), nothing, GaussianTransition(nothing, nothing), new, old))


density = st.floats(-3, 3, width=32)


@given(st.lists(st.tuples(density, density, density), min_size=1, max_size=8), st.sampled_from([1e-4, 0.1, 0.5]))
@strategies.thorough
def test_the_loss_equals_the_reference(edges: list[tuple[float, float, float]], clip: float) -> None:
    new, old, advantage = (torch.tensor(column, dtype=torch.float64) for column in zip(*edges, strict=True))
    result = clipped_loss(probability_ratio(new, old), advantage, clip)
    expected = [reference.clipped_loss(n, o, a, clip) for n, o, a in edges]
    assert result.tolist() == pytest.approx(expected)
    assert float(result.mean()) == pytest.approx(reference.mean(expected))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "away"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.2, True),  # already more likely than the clip allows
        (0.5, 2.0, -1.0, False),
        (0.5, -2.0, 1.8, True),  # already less likely than the clip allows
        (1.5, -2.0, 3.0, False),
        (1.05, 2.0, -2.1, False),
        (0.5, 0.0, 0.0, False),  # no advantage: nothing to silence
    ],
)
def test_worked_losses(ratio: float, advantage: float, loss: float, away: bool) -> None:
    rho = torch.tensor([ratio], requires_grad=True)
    result = clipped_loss(rho, torch.tensor([advantage]), 0.1)
    assert silenced(result, rho, torch.tensor([advantage])).tolist() == [away]
    result.sum().backward()
    assert result.tolist() == pytest.approx([loss])
    assert rho.grad is not None
    assert float(rho.grad) == (0 if away else -advantage)


@given(st.lists(st.tuples(density, density, density), min_size=1, max_size=8), st.sampled_from([1e-4, 0.1]))
@strategies.thorough
def test_silenced_edges_have_gone_past_the_clip_the_way_they_should(
    edges: list[tuple[float, float, float]], clip: float
) -> None:
    new, old, advantage = (torch.tensor(column, dtype=torch.float64) for column in zip(*edges, strict=True))
    ratio = probability_ratio(new, old).requires_grad_()
    past = [(a > 0 and math.exp(n - o) > 1 + clip) or (a < 0 and math.exp(n - o) < 1 - clip) for n, o, a in edges]
    assert silenced(clipped_loss(ratio, advantage, clip), ratio, advantage).tolist() == past


def test_a_loss_that_does_not_look_at_ratios_silences_nothing() -> None:
    ratio = torch.ones(3, requires_grad=True)
    assert silenced(torch.ones(3, requires_grad=True) * 2, ratio, torch.ones(3)).tolist() == [False] * 3


def test_on_policy_the_ratio_is_1_and_the_gradient_is_reinforce() -> None:
    old = torch.tensor([-1.3, 0.2, 5.0])
    new = old.clone().requires_grad_()
    advantage = torch.tensor([1.0, -2.0, 0.5])
    ratio = probability_ratio(new, old)
    assert torch.equal(ratio, torch.ones(3))
    clipped_loss(ratio, advantage, 1e-4).mean().backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, -advantage / 3)


def test_the_ratio_is_new_over_old() -> None:
    ratio: Tensor = probability_ratio(torch.tensor([1.0]), torch.tensor([0.0]))
    assert float(ratio) == pytest.approx(math.e)


def test_mismatched_edges_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) ratios and \(3, 1\) advantages"):
        clipped_loss(torch.ones(3), torch.ones(3, 1), 0.1)
