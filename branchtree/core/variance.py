"""Where a leaf reward's variance arises: nested analysis of variance over the splits of a tree.

Level j is what differs between the children of split j: the noise drawn from that split up to the next one, and
for the last split all noise that follows. Splits, and the steps that are stochastic, can be chosen by these figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from branchtree.core.fusion import TIE, NodeValues
from branchtree.core.segments import segment_count, segment_std, segment_sum
from branchtree.core.tree import Topology


@dataclass(frozen=True)
class SplitVariance:
    """One entry per split, in order, pooled over prompts with a valid leaf."""

    share: Tensor  # (S,) share of the within-prompt sum of squares that arises at this level
    independent_share: Tensor  # (S,) the share it would have if all leaves were independent
    component: Tensor  # (S,) unbiased variance component, over their sum; may be negative


@dataclass(frozen=True)
class _Levels:
    """Sums over nodes of a nested design: S levels below the prompts."""

    squares: Tensor  # (S,) sum of squares
    freedom: Tensor  # (S,) degrees of freedom
    coefficient: Tensor  # (S, S) expected sum of squares of level j per unit variance of level k


def split_variance(topology: Topology, rewards: Tensor, valid: Tensor) -> SplitVariance | None:
    """Decompose the rewards (L,) of valid leaves (L,); None if no tree splits or nothing varies."""
    splits = max(len(plan.splits) for plan in topology.plans)
    total = _Levels(
        torch.zeros(splits, dtype=torch.float64),
        torch.zeros(splits, dtype=torch.float64),
        torch.zeros(splits, splits, dtype=torch.float64),
    )
    for steps, prompts in _alike([plan.splits for plan in topology.plans]):
        leaves = valid & prompts[topology.leaf_root]
        if not steps or not bool(leaves.any()):
            continue
        depths = [0, *(step + 1 for step in steps)]
        labels = [topology.ancestor[depth][leaves] for depth in depths]
        levels = _nested(rewards.double()[leaves], [_relabel(label) for label in labels])
        rows = slice(0, len(steps))
        total.squares[rows] += levels.squares
        total.freedom[rows] += levels.freedom
        total.coefficient[rows, rows] += levels.coefficient
    rounding = TIE**2 * float(rewards.double()[valid].square().sum())
    if float(total.squares.sum()) <= rounding or bool((total.freedom <= 0).any()):
        return None
    component = torch.linalg.solve_triangular(total.coefficient, total.squares.unsqueeze(1), upper=True)[:, 0]
    return SplitVariance(
        share=total.squares / total.squares.sum(),
        independent_share=total.freedom / total.freedom.sum(),
        component=component / component.sum(),
    )


def _alike(splits: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], Tensor]]:
    """Each set of split steps, and which prompts (P,) bool have it: they can be worked on together."""
    return [(kind, torch.tensor([kind == own for own in splits])) for kind in dict.fromkeys(splits)]


def _relabel(labels: Tensor) -> Tensor:
    """Number the distinct labels from 0."""
    numbers: Tensor = torch.unique(labels, return_inverse=True)[1]
    return numbers


def _nested(rewards: Tensor, labels: list[Tensor]) -> _Levels:
    """Nested sums of squares; labels[0] is the prompt, labels[-1] the leaves themselves."""
    means, sizes, groups = [], [], []
    for label in labels:
        count = int(label.max()) + 1
        size = segment_count(label, count).double()
        means.append((segment_sum(rewards, label, count) / size)[label])
        sizes.append(size[label])
        groups.append(count)
    levels = len(labels) - 1
    squares = torch.stack([(means[j + 1] - means[j]).square().sum() for j in range(levels)])
    freedom = torch.tensor([float(groups[j + 1] - groups[j]) for j in range(levels)], dtype=torch.float64)
    # E[sum of squares of level j] = sum_k c_jk * component_k, with sums over leaves of n_q / n_m: leaf l counts
    # the size of its level-k node over that of its level-j node, once with each side of the difference of means.
    coefficient = torch.zeros(levels, levels, dtype=torch.float64)
    for j in range(levels):
        for k in range(j, levels):
            size = sizes[k + 1]
            coefficient[j, k] = (size / sizes[j + 1] - size / sizes[j]).sum()
    return _Levels(squares, freedom, coefficient)


@dataclass(frozen=True)
class SplitSpread:
    """One entry per split, in order, over the parents that split there and have at least two valid children."""

    spread: Tensor  # (S,) mean sample deviation of siblings' values
    ties: Tensor  # (S,) fraction of the parents whose children's values are all equal, but for the scores' rounding


def split_spread(topology: Topology, values: NodeValues) -> SplitSpread:
    """Return how far siblings' values lie apart at each split; an entry is NaN where no parent can be compared."""
    splits = max(len(plan.splits) for plan in topology.plans)
    spread: list[list[Tensor]] = [[] for _ in range(splits)]
    rounding = values.rounding(topology)
    for steps, prompts in _alike([plan.splits for plan in topology.plans]):
        for split, step in enumerate(steps):
            mine = values.valid[step + 1] & prompts[topology.root[step + 1]]
            family, parents = topology.parent[step + 1][mine], topology.width(step)
            compared = segment_count(family, parents) > 1
            floor = rounding[topology.root[step]]
            spread[split].append(segment_std(values.value[step + 1][mine], family, parents, floor)[compared])
    levels = [torch.cat(level) for level in spread]
    return SplitSpread(
        spread=torch.stack([level.mean() for level in levels]) if levels else torch.zeros(0),
        ties=torch.stack([(level == 0).double().mean() for level in levels]) if levels else torch.zeros(0),
    )
