"""From node values to the advantage of the edge into each node.

Three estimators share one signature: per depth (N_d,) float64, 0 for roots, for nodes without a value, and
wherever there is nothing to compare with: a single node, or a tie, values that differ by no more than the rounding of
the scores (``NodeValues.rounding``). An edge takes the advantage of the node it leads to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from branchtree.core.fusion import NodeValues
from branchtree.core.segments import (
    over_spread,
    segment_count,
    segment_mean,
    segment_standardised,
    segment_std,
    segment_sum,
)
from branchtree.core.tree import Topology

Advantages = tuple[Tensor, ...]
Estimator = Callable[[Topology, NodeValues, float], Advantages]


def depth_advantages(topology: Topology, values: NodeValues, eps: float) -> Advantages:
    """A(n) = (V(n) - mean_d) / (std_d + eps) over one prompt's valid nodes at depth d (arXiv 2509.06040, eq. 4).

    std is the sample deviation. A depth with one node, or with a tie, gives 0.
    """
    rounding = values.rounding(topology)

    def at(depth: int) -> Tensor:
        valid = values.valid[depth]
        value, prompt = values.value[depth][valid], topology.root[depth][valid]
        return _spread(valid, segment_standardised(value, prompt, topology.prompts, eps, rounding))

    return _at_every_depth(topology, at)


def leaf_advantages(topology: Topology, values: NodeValues, eps: float) -> Advantages:
    """A(n) = (V(n) - mean reward of the prompt's valid leaves not below n) / (std of the prompt's leaves + eps).

    The leave-one-out baseline, for a node with several leaves as for a leaf. A node that all valid leaves
    descend from gets 0.
    """
    reward, valid_leaf = values.value[-1], values.valid[-1]
    leaf_root = topology.leaf_root[valid_leaf]
    reward = reward[valid_leaf]
    total = segment_sum(reward, leaf_root, topology.prompts)
    count = segment_count(leaf_root, topology.prompts)
    std = segment_std(reward, leaf_root, topology.prompts, values.rounding(topology))

    def at(depth: int) -> Tensor:
        nodes, prompt = topology.ancestor[depth][valid_leaf], topology.root[depth]
        below = segment_count(nodes, topology.width(depth))
        others = count[prompt] - below
        baseline = (total[prompt] - segment_sum(reward, nodes, topology.width(depth))) / others.clamp_min(1)
        compared = values.valid[depth] & (others > 0)
        advantage = over_spread((values.value[depth] - baseline)[compared], std[prompt][compared], eps)
        return _spread(compared, advantage)

    return _at_every_depth(topology, at)


def sibling_advantages(topology: Topology, values: NodeValues, eps: float) -> Advantages:
    """A(n) = (V(n) - mean over n and its valid siblings) / (std_d + eps), std_d as in ``depth_advantages``.

    The sibling baseline (arXiv 2509.06040, appendix B.3). An only child gets 0, and so do siblings that tie.
    """
    rounding = values.rounding(topology)
    advantages = [torch.zeros(topology.prompts, dtype=torch.float64)]
    for depth in topology.depths[1:]:
        valid = values.valid[depth]
        value, prompt = values.value[depth][valid], topology.root[depth][valid]
        family, families = topology.parent[depth][valid], topology.width(depth - 1)
        std = segment_std(value, prompt, topology.prompts, rounding)[prompt]
        apart = segment_std(value, family, families, rounding[topology.root[depth - 1]])[family] > 0
        centred = value - segment_mean(value, family, families)[family]
        advantages.append(_spread(valid, over_spread(centred, std * apart, eps)))
    return tuple(advantages)


ESTIMATORS: dict[str, Estimator] = {
    "depth": depth_advantages,
    "leaf": leaf_advantages,
    "sibling": sibling_advantages,
}


def advantage_moments(topology: Topology, advantages: Advantages, edges: Sequence[Tensor]) -> Tensor:
    """Return count, mean and sum of squared deviations of each prompt's advantages, (P, 3) float64.

    Of the ``edges``, per depth (N_d,) bool, those count that have an advantage.
    """
    counted = [mask & (level != 0) for mask, level in zip(edges, advantages, strict=True)]
    values = torch.cat([level[mask] for level, mask in zip(advantages, counted, strict=True)])
    prompt = torch.cat([root[mask] for root, mask in zip(topology.root, counted, strict=True)])
    mean = segment_mean(values, prompt, topology.prompts)
    squares = segment_sum((values - mean[prompt]).square(), prompt, topology.prompts)
    return torch.stack([segment_count(prompt, topology.prompts).double(), mean, squares], dim=1)


def batch_normalised(advantages: Advantages, moments: Tensor, eps: float) -> Advantages:
    """Return advantages less their mean over a whole batch, over their sample deviation + eps; 0 stays 0.

    GDPO's second normalisation (arXiv 2601.05242), after each reward's within its group. ``moments`` (Q, 3) are those
    of all prompts of the batch, in their order, so that the result does not depend on who computed which.
    """
    count, mean, squares = moments.unbind(1)
    total = count.sum()
    centre = (count * mean).sum() / total.clamp_min(1)
    std = ((squares + count * (mean - centre).square()).sum() / (total - 1).clamp_min(1)).sqrt()
    return tuple(over_spread((level - centre) * (level != 0), std, eps) for level in advantages)


def _at_every_depth(topology: Topology, at: Callable[[int], Tensor]) -> Advantages:
    """An estimate that depends on a depth's nodes alone, so that an only child has its parent's advantage."""
    levels: list[Tensor] = []
    for depth in reversed(topology.depths):
        levels.append(levels[-1] if topology.unbranched(depth) else at(depth))
    return tuple(reversed(levels))


def _spread(where: Tensor, chosen: Tensor) -> Tensor:
    """Put the chosen nodes' numbers back among all nodes of the depth, 0 elsewhere."""
    return torch.zeros(where.numel(), dtype=chosen.dtype).masked_scatter_(where, chosen)
