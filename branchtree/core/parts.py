"""A part of one prompt's tree: a run of its leaves and all that leads to them.

A tree whose leaves are too many for one device is grown in parts, one by each process. Nodes of a depth are ordered,
so what a part holds of each depth is a run too. Nodes that lead to leaves of several parts are held, and computed, by
each of them; but a node, and so the edge into it, has exactly one owner: the part that holds its first leaf.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from branchtree.core.schedule import TreePlan


@dataclass(frozen=True)
class TreePart:
    """A run of one prompt's leaves. Raises ValueError unless it is one, with at least one leaf."""

    plan: TreePlan
    leaves: range  # among the prompt's leaves

    def __post_init__(self) -> None:
        if self.leaves.step != 1 or not 0 <= self.leaves.start < self.leaves.stop <= self.plan.leaves:
            raise ValueError(f"{self.leaves} is no run of a tree's {self.plan.leaves} leaves")

    @staticmethod
    def whole(plan: TreePlan) -> TreePart:
        """The part that is all of the tree."""
        return TreePart(plan, range(plan.leaves))

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return len(self.leaves) == self.plan.leaves

    @cached_property
    def held(self) -> tuple[range, ...]:
        """Per depth, (T + 1,): the nodes that lead to the part's leaves, by their places in the whole tree."""
        return tuple(range(self.leaves.start // each, _up(self.leaves.stop, each)) for each in self._leaves_below)

    @cached_property
    def owned(self) -> tuple[range, ...]:
        """Per depth, (T + 1,): those of ``held`` whose first leaf is the part's; over all parts each node is once."""
        return tuple(range(_up(self.leaves.start, each), _up(self.leaves.stop, each)) for each in self._leaves_below)

    @property
    def _leaves_below(self) -> list[int]:
        return [self.plan.leaves // width for width in self.plan.widths]


def cut(plan: TreePlan, parts: int) -> list[TreePart]:
    """A tree in parts of as equal numbers of leaves as can be. Raises ValueError if there are fewer leaves."""
    if not 1 <= parts <= plan.leaves:
        raise ValueError(f"a tree of {plan.leaves} leaves cannot be cut into {parts} parts")
    ends = [plan.leaves * place // parts for place in range(parts + 1)]
    return [TreePart(plan, range(start, stop)) for start, stop in pairwise(ends)]


def _up(leaf: int, each: int) -> int:
    """How many nodes with ``each`` leaves have their first leaf before this one."""
    return -(-leaf // each)
