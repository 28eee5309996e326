"""Topologies against linked nodes, and the counts of ragged batches."""

from __future__ import annotations

import pytest
import reference
import strategies
import torch
from hypothesis import given
from reference import Node
from strategies import make_plan

from branchtree.core.schedule import TreePlan
from branchtree.core.tree import NO_PARENT, BranchTree, grow


def planted(plans: tuple[TreePlan, ...]) -> list[Node]:
    roots = [reference.plant(i, plan.factors, plan.stochastic, plan.trained) for i, plan in enumerate(plans)]
    reference.number(roots)
    return roots


@given(strategies.batches())
@strategies.thorough
def test_a_topology_equals_linked_nodes(plans: tuple[TreePlan, ...]) -> None:
    topology, roots = grow(plans), planted(plans)
    assert topology.steps == reference.height(roots[0])
    assert topology.prompts == len(roots)
    for depth in topology.depths:
        nodes = reference.level(roots, depth)
        assert topology.width(depth) == len(nodes)
        assert topology.root[depth].tolist() == [node.prompt for node in nodes]
        parents = [node.parent.place if node.parent else NO_PARENT for node in nodes]
        assert topology.parent[depth].tolist() == parents
        below = [node.place for node in nodes for _ in reference.leaves(node)]
        assert topology.ancestor[depth].tolist() == below
        for prompt in range(topology.prompts):
            assert list(topology.span(prompt, depth)) == [n.place for n in nodes if n.prompt == prompt]
    assert topology.leaf_root.tolist() == [leaf.prompt for leaf in reference.level(roots, topology.steps)]


@given(strategies.batches())
@strategies.thorough
def test_flags_are_spread_over_nodes_and_edges(plans: tuple[TreePlan, ...]) -> None:
    topology, roots = grow(plans), planted(plans)
    for step in range(topology.steps):
        children = reference.level(roots, step + 1)
        flags = topology.per_edge(step, [plan.trained[step] for plan in plans])
        assert flags.tolist() == [node.trained for node in children]
        parents = reference.level(roots, step)
        assert topology.active(step).tolist() == [node.children[0].stochastic for node in parents]


def test_prompts_may_branch_differently() -> None:
    topology = grow([make_plan(3, {0: 2}), make_plan(3, {1: 3})])
    assert [topology.width(depth) for depth in topology.depths] == [2, 3, 5, 5]
    assert topology.parent[1].tolist() == [0, 0, 1]
    assert topology.parent[2].tolist() == [0, 1, 2, 2, 2]
    assert topology.root[2].tolist() == [0, 0, 1, 1, 1]
    assert topology.ancestor[0].tolist() == [0, 0, 1, 1, 1]


def test_leaves_are_the_last_states() -> None:
    topology = grow([make_plan(2, {0: 2})])
    states = tuple(torch.full((topology.width(depth), 3), float(depth)) for depth in topology.depths)
    tree = BranchTree(topology, torch.tensor([1.0, 0.5, 0.0]), states, ())
    assert tree.leaves is states[-1]


def test_a_tree_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        grow([])


def test_prompts_share_one_grid() -> None:
    with pytest.raises(ValueError, match="same number of steps"):
        grow([make_plan(3, {}), make_plan(4, {})])
