"""Edge masks against the recursive reference, and the paper's own counts."""

from __future__ import annotations

import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Keep, Node
from strategies import Forest, make_plan

from branchtree.core.fusion import NodeValues, fuse
from branchtree.core.pruning import (
    EdgeMask,
    all_of,
    depth_window,
    extreme_leaves,
    keep_paths,
    outside_window,
    parent_top1,
    trainable_edges,
)
from branchtree.core.schedule import PRESET_SPLITS
from branchtree.core.tree import Topology, grow

DENSE = make_plan(20, dict.fromkeys(PRESET_SPLITS["dense"], 2))


def assert_mask(mask: EdgeMask, roots: list[Node], keep: Keep) -> None:
    """Equal on all edges that lead to a valid leaf; no other edge is ever trained."""
    for depth, flags in enumerate(mask):
        nodes = reference.level(roots, depth)
        assert flags.dtype == torch.bool and flags.numel() == len(nodes)
        for node, flag in zip(nodes, flags.tolist(), strict=True):
            if reference.valid_leaves(node):
                assert flag == keep(node), (node.prompt, node.depth, node.place)


def pruned_steps(mask: EdgeMask, topology: Topology) -> dict[int, int]:
    """How many edges of each step are left out."""
    return {step: int((~mask[step + 1]).sum()) for step in range(topology.steps) if not bool(mask[step + 1].all())}


@given(strategies.forests())
@strategies.thorough
def test_parent_top1_equals_the_reference(forest: Forest) -> None:
    """The values come from the reference, so that equal ones tie exactly in both."""
    roots = forest.nodes()
    reference.fuse_all(roots, 1.0)
    mask = parent_top1(forest.topology, strategies.node_values(roots))
    assert_mask(mask, roots, reference.parent_top1(roots))


@given(strategies.forests(), st.integers(1, 5))
@strategies.thorough
def test_extreme_equals_the_reference(forest: Forest, count: int) -> None:
    roots = forest.nodes()
    mask = extreme_leaves(forest.topology, forest.reward_tensor, forest.valid_tensor, count)
    assert_mask(mask, roots, reference.extreme(roots, count))


@given(strategies.forests(), st.integers(1, 4), st.integers(1, 5), st.integers(0, 7), st.integers(0, 40))
@strategies.thorough
def test_the_depth_window_equals_the_reference(
    forest: Forest, size: int, every: int, stop: int, iteration: int
) -> None:
    roots = forest.nodes()
    mask = depth_window(forest.topology, size, every, stop, iteration)
    assert_mask(mask, roots, reference.outside_depth_window(roots, size, every, stop, iteration))


@given(strategies.batches())
@strategies.thorough
def test_trainable_edges_are_those_of_the_plan(plans: tuple[strategies.TreePlan, ...]) -> None:
    roots = [reference.plant(i, plan.factors, plan.stochastic, plan.trained) for i, plan in enumerate(plans)]
    for depth, flags in enumerate(trainable_edges(grow(plans))):
        assert flags.tolist() == [node.trained for node in reference.level(roots, depth)]


def scored(rewards: list[float], valid: list[bool] | None = None) -> tuple[Topology, NodeValues]:
    """The Dense tree with equal path densities."""
    topology = grow([DENSE])
    log_prob = [torch.zeros(topology.width(depth)) for depth in topology.depths]
    flags = torch.tensor(valid or [True] * 16)
    return topology, fuse(topology, log_prob, torch.tensor(rewards), flags)


def test_parent_top1_leaves_out_10_steps_of_8_edges() -> None:
    topology, values = scored([float(7 * i % 16) for i in range(16)])
    mask = parent_top1(topology, values)
    assert pruned_steps(mask, topology) == dict.fromkeys(range(10, 20), 8)
    winners = [2 * pair + (7 * (2 * pair + 1) % 16 > 7 * 2 * pair % 16) for pair in range(8)]
    assert torch.nonzero(mask[20])[:, 0].tolist() == winners
    assert bool(mask[10].all())  # the split's own edges stay


def test_the_first_of_equal_children_wins() -> None:
    topology, values = scored([1.0] * 16)
    assert torch.nonzero(parent_top1(topology, values)[20])[:, 0].tolist() == list(range(0, 16, 2))


def test_a_child_without_a_value_never_wins() -> None:
    """Negative rewards: a masked child read as 0 would win."""
    topology, values = scored([-1.0] * 16, [i not in {0, 2, 3} for i in range(16)])
    kept = torch.nonzero(parent_top1(topology, values)[20])[:, 0].tolist()
    assert kept == [1, 4, 6, 8, 10, 12, 14]


def test_extreme_pruning_keeps_both_ends() -> None:
    topology, _ = scored([0.0] * 16)
    rewards = torch.tensor([float(7 * i % 16) for i in range(16)])
    mask = extreme_leaves(topology, rewards, torch.ones(16, dtype=torch.bool), 4)
    kept = [i for i in range(16) if 7 * i % 16 in {0, 1, 2, 3, 12, 13, 14, 15}]
    assert torch.nonzero(mask[20])[:, 0].tolist() == kept
    assert pruned_steps(mask, topology) == dict.fromkeys(range(10, 20), 8)


def test_extreme_pruning_needs_a_leaf() -> None:
    topology, _ = scored([0.0] * 16)
    with pytest.raises(ValueError, match="at least one leaf at each end, not 0"):
        extreme_leaves(topology, torch.zeros(16), torch.ones(16, dtype=torch.bool), 0)


@pytest.mark.parametrize(
    ("iteration", "first"), [(0, 9), (29, 9), (30, 10), (60, 11), (179, 14), (180, 15), (9000, 15)]
)
def test_the_depth_window_slides_from_the_last_split(iteration: int, first: int) -> None:
    topology = grow([DENSE])
    mask = depth_window(topology, 4, 30, 15, iteration)
    expected = {step: 8 * (1 + (step >= 9)) for step in range(first, first + 4)}
    assert pruned_steps(mask, topology) == expected


def test_each_prompt_has_its_own_window() -> None:
    topology = grow([make_plan(6, {1: 2}), make_plan(6, {3: 2})])
    mask = depth_window(topology, 2, 30, 5, 0)
    pruned = [
        {step for step in range(6) if not bool(mask[step + 1][topology.root[step + 1] == prompt].any())}
        for prompt in range(2)
    ]
    assert pruned == [{1, 2}, {3, 4}]


def test_a_window_that_stops_before_the_last_split_stays_there() -> None:
    topology = grow([DENSE])
    assert set(pruned_steps(depth_window(topology, 4, 30, 3, 600), topology)) == {9, 10, 11, 12}


def test_outside_window_takes_one_range_per_prompt() -> None:
    topology = grow([make_plan(3, {0: 2}), make_plan(3, {})])
    mask = outside_window(topology, [range(1), range(1, 3)])
    assert [flags.tolist() for flags in mask[1:]] == [[False, False, True], [True, True, False], [True, True, False]]


def test_masks_intersect() -> None:
    topology = grow([make_plan(3, {0: 2})])
    both = all_of(outside_window(topology, [range(1)]), keep_paths(topology, torch.tensor([True, False])))
    assert [flags.tolist() for flags in both] == [[False], [False, False], [True, False], [True, False]]


def test_a_tree_without_splits_is_not_pruned() -> None:
    topology = grow([make_plan(4, {})])
    values = NodeValues((torch.ones(1).double(),) * 5, (torch.ones(1, dtype=torch.bool),) * 5)
    assert all(bool(flags.all()) for flags in parent_top1(topology, values)[1:])
