"""A share of one prompt's tree: consecutive leaves and all that leads to them.

A tree whose leaves are too many for one device is grown in shares, one by each process. Nodes of a depth are ordered,
so a share holds consecutive nodes of each depth. Nodes that lead to leaves of several shares are held, and computed, by
each of them; but a node, and so the edge into it, has exactly one owner: the share that holds its first leaf.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from branchtree.core.schedule import TreePlan


@dataclass(frozen=True)
class TreeShare:
    """Consecutive leaves of one prompt, at least one. Raises ValueError for any other range."""

    plan: TreePlan
    leaves: range  # among the prompt's leaves

    def __post_init__(self) -> None:
        if self.leaves.step != 1 or not 0 <= self.leaves.start < self.leaves.stop <= self.plan.leaves:
            raise ValueError(f"{self.leaves} are not consecutive leaves of a tree's {self.plan.leaves}")

    @staticmethod
    def whole(plan: TreePlan) -> TreeShare:
        """Return the share that is the whole tree."""
        return TreeShare(plan, range(plan.leaves))

    @property
    def is_whole(self) -> bool:
        """Return whether nothing is left out."""
        return len(self.leaves) == self.plan.leaves

    @cached_property
    def held(self) -> tuple[range, ...]:
        """Per depth, (T + 1,): the nodes that lead to the share's leaves, by their indices in the whole tree."""
        return tuple(range(self.leaves.start // each, _up(self.leaves.stop, each)) for each in self._leaves_below)

    @cached_property
    def owned(self) -> tuple[range, ...]:
        """Per depth, (T + 1,): the held nodes whose first leaf is the share's; over all shares each node is once."""
        return tuple(range(_up(self.leaves.start, each), _up(self.leaves.stop, each)) for each in self._leaves_below)

    @property
    def _leaves_below(self) -> list[int]:
        return [self.plan.leaves // width for width in self.plan.widths]


def cut(plan: TreePlan, shares: int) -> list[TreeShare]:
    """Cut a tree into shares whose numbers of leaves differ by one at most.

    Raises ValueError if there are fewer leaves than shares.
    """
    if not 1 <= shares <= plan.leaves:
        raise ValueError(f"a tree of {plan.leaves} leaves cannot be cut into {shares} shares")
    ends = [plan.leaves * i // shares for i in range(shares + 1)]
    return [TreeShare(plan, range(start, stop)) for start, stop in pairwise(ends)]


def _up(leaf: int, each: int) -> int:
    """Return how many nodes with ``each`` leaves have their first leaf before this one."""
    return -(-leaf // each)
