"""Which edges are trained: masks over a scored tree. The rollout and the rewards always see the full tree.

A mask is per depth (N_d,) bool, for the edge into each node; that of depth 0 is all False.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from branchtree.core.fusion import NodeValues
from branchtree.core.schedule import SlidingWindow
from branchtree.core.segments import segment_count, segment_max
from branchtree.core.tree import Topology

EdgeMask = tuple[Tensor, ...]
Prune = Callable[[Topology, NodeValues, int], EdgeMask]
"""(topology, the values that rank nodes and, at the last depth, leaves, iteration) -> the edges to train."""


def trainable_edges(topology: Topology) -> EdgeMask:
    """Return the edges that the plans train; where trajectories draw their steps, those that any leaf below drew."""
    masks = [torch.zeros(topology.prompts, dtype=torch.bool)]
    for step in range(topology.steps):
        trained = topology.per_edge(step, [plan.trained[step] for plan in topology.plans])
        masks.append(trained & ~topology.still(step))
    if any(plan.fraction for plan in topology.plans):
        return all_of(tuple(masks), _drawn(topology))
    return tuple(masks)


def trainable_leaves(topology: Topology, valid: Tensor) -> EdgeMask:
    """Return the leaves that a forward objective can train: those with a score, ``valid`` (L,) bool."""
    return (*(torch.zeros(topology.width(depth), dtype=torch.bool) for depth in topology.depths[:-1]), valid)


def trainable_nodes(topology: Topology, valid: Tensor) -> EdgeMask:
    """Return the nodes that a forward objective can train: leaves with a score, ``valid`` (L,) bool, and inner nodes.

    Those are nodes that a trained edge leads to, above a leaf with a score.
    """
    inner = [
        edges & (segment_count(topology.ancestor[depth][valid], topology.width(depth)) > 0)
        for depth, edges in enumerate(trainable_edges(topology)[:-1])
    ]
    return (*inner, valid)


def without_ties(topology: Topology, keep: EdgeMask, advantages: Sequence[Tensor]) -> EdgeMask:
    """Return what is kept of the prompts of which something that is kept has an advantage."""
    apart = torch.zeros(topology.prompts, dtype=torch.bool)
    for root, mask, advantage in zip(topology.root, keep, advantages, strict=True):
        apart[root[mask & (advantage != 0)]] = True
    return tuple(mask & apart[root] for root, mask in zip(topology.root, keep, strict=True))


def _drawn(topology: Topology) -> EdgeMask:
    """The edges that lead to a leaf whose trajectory trains their step."""
    trains = torch.ones(topology.steps, topology.width(topology.steps), dtype=torch.bool)
    for prompt, plan in enumerate(topology.plans):
        if plan.fraction is None:
            continue
        steps = [step for step in range(plan.steps) if plan.trained[step]]
        leaves = topology.span(prompt, topology.steps)
        trains[:, leaves.start : leaves.stop] = False
        for i, leaf in enumerate(leaves):
            trains[plan.fraction.steps(i, steps), leaf] = True
    masks = [torch.zeros(topology.prompts, dtype=torch.bool)]
    for step in range(topology.steps):
        below = topology.ancestor[step + 1][trains[step]]
        masks.append(segment_count(below, topology.width(step + 1)) > 0)
    return tuple(masks)


def all_of(first: EdgeMask, second: EdgeMask) -> EdgeMask:
    """The edges in both masks."""
    return tuple(a & b for a, b in zip(first, second, strict=True))


def any_of(first: EdgeMask, second: EdgeMask) -> EdgeMask:
    """The edges in either mask."""
    return tuple(a | b for a, b in zip(first, second, strict=True))


def keep_paths(topology: Topology, leaves: Tensor) -> EdgeMask:
    """After each prompt's last split, keep only edges that lead to a chosen leaf, ``leaves`` (L,) bool."""
    masks = [torch.zeros(topology.prompts, dtype=torch.bool)]
    for step in range(topology.steps):
        width = topology.width(step + 1)
        leads = segment_count(topology.ancestor[step + 1][leaves], width) > 0
        masks.append(leads | topology.per_edge(step, [step <= plan.last_split for plan in topology.plans]))
    return tuple(masks)


def parent_top1(topology: Topology, values: NodeValues) -> EdgeMask:
    """At the last split, per parent, only the child with the highest value keeps the edges below it.

    BranchGRPO's "Parent-Top1" width pruning (arXiv 2509.06040, section 4.3). The first of equal children wins;
    a child without a value never does. A tree without a split keeps all its edges.
    """
    chosen = torch.zeros(topology.width(topology.steps), dtype=torch.bool)
    for prompt, plan in enumerate(topology.plans):
        depth = plan.last_split + 1
        nodes = topology.span(prompt, depth)
        if depth == 0:
            chosen |= topology.leaf_root == prompt
            continue
        winners = _first_best(
            values.value[depth].where(values.valid[depth], torch.tensor(-torch.inf, dtype=torch.float64)),
            topology.parent[depth],
            topology.width(depth - 1),
        )
        inside = torch.zeros_like(winners)
        inside[nodes.start : nodes.stop] = True
        chosen |= (winners & inside)[topology.ancestor[depth]]
    return keep_paths(topology, chosen)


def _first_best(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return which members are the first to hold their group's maximum; none in a group of only -inf."""
    best = (values == segment_max(values, group, groups)[group]) & (values > -torch.inf)
    order = torch.arange(values.numel())
    first = torch.full((groups,), values.numel()).scatter_reduce_(0, group[best], order[best], "amin")
    return best & (order == first[group])


def extreme_leaves(topology: Topology, rewards: Tensor, valid: Tensor, count: int) -> EdgeMask:
    """Only the ``count`` best and ``count`` worst valid leaves of each prompt keep the edges after the last split.

    BranchGRPO's "Extreme-b" width pruning. Equal rewards are ranked in leaf order.
    """
    if count < 1:
        raise ValueError(f"extreme pruning keeps at least one leaf at each end, not {count}")
    chosen = torch.zeros_like(valid)
    for prompt in range(topology.prompts):
        leaves = torch.nonzero(valid & (topology.leaf_root == prompt))[:, 0]
        ranked = leaves[torch.argsort(rewards[leaves], stable=True)]
        chosen[ranked[:count]] = True
        chosen[ranked[-count:]] = True
    return keep_paths(topology, chosen)


def outside_window(topology: Topology, windows: Sequence[range]) -> EdgeMask:
    """The edges of steps outside each prompt's window (P ranges of steps)."""
    masks = [torch.zeros(topology.prompts, dtype=torch.bool)]
    for step in range(topology.steps):
        masks.append(topology.per_edge(step, [step not in window for window in windows]))
    return tuple(masks)


def depth_window(topology: Topology, size: int, every: int, stop: int, iteration: int) -> EdgeMask:
    """Leave out a window of steps that starts at the last split and slides deeper with training.

    BranchGRPO's depth pruning (arXiv 2509.06040, section 4.3): one step deeper every ``every`` iterations, until
    the window starts at step ``stop``.
    """
    starts = [max(plan.last_split, 0) for plan in topology.plans]
    windows = [SlidingWindow(size, start, every, max(stop, start)).steps(iteration) for start in starts]
    return outside_window(topology, windows)
