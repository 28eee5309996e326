"""The layout of a recorded tree: depth to the right, one row per leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from branchtree.report.read import Node, Tree

SPLIT_WIDTH, CHAIN_WIDTH = 92, 23
LEFT, TOP = 52, 64
ROW_HEIGHTS = 76.0, 46.0, 30.0  # with few pictures to look at, with up to 32 leaves, and with more


@dataclass(frozen=True)
class TreeLayout:
    """Positions of a tree's nodes in the drawing's units."""

    tree: Tree
    columns: tuple[float, ...]  # x of each depth
    rows: Mapping[int, float]  # y of each node by id
    row_height: float
    children: Mapping[int, Sequence[Node]]

    @property
    def right(self) -> float:
        """The x coordinate of the deepest nodes."""
        return self.columns[-1]

    @property
    def bottom(self) -> float:
        """The y coordinate below the last row."""
        return TOP + self.row_height * sum(not self.children[node.id] for node in self.tree.nodes)

    def position(self, node: Node) -> tuple[float, float]:
        """Return (x, y) of a node."""
        return self.columns[node.depth], self.rows[node.id]

    def splits_at(self, step: int) -> int:
        """Return the largest number of children at a step; 1 in a chain."""
        return max((len(self.children[node.id]) for node in self.tree.nodes if node.depth == step), default=1)


def lay_out_tree(tree: Tree) -> TreeLayout:
    """Space leaves evenly in the order of their parents, and put other nodes halfway between their outer children."""
    children: dict[int, list[Node]] = {node.id: [] for node in tree.nodes}
    for node in tree.nodes:
        if node.parent is not None:
            children[node.parent].append(node)
    ends = sum(not below for below in children.values())
    pictured = any(leaf.thumbnail for leaf in tree.leaves)
    height = ROW_HEIGHTS[0] if ends <= 16 and pictured else ROW_HEIGHTS[1] if ends <= 32 else ROW_HEIGHTS[2]
    rows: dict[int, float] = {}
    above = 0  # leaves so far
    for node in _bottom_up(tree, children):
        below = children[node.id]
        if below:
            rows[node.id] = (rows[below[0].id] + rows[below[-1].id]) / 2
        else:
            rows[node.id] = TOP + height * (0.5 + above)
            above += 1
    layout = TreeLayout(tree, (), rows, height, children)
    columns = [float(LEFT)]
    for step in range(max(node.depth for node in tree.nodes)):
        columns.append(columns[-1] + (SPLIT_WIDTH if layout.splits_at(step) > 1 else CHAIN_WIDTH))
    return TreeLayout(tree, tuple(columns), rows, height, children)


def _bottom_up(tree: Tree, children: Mapping[int, Sequence[Node]]) -> list[Node]:
    """Return nodes so that each follows its children; without recursion, as trees may be thousands of steps deep."""
    waiting = [node for node in tree.nodes if node.parent is None]
    order: list[Node] = []
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting.extend(children[node.id])
    return order[::-1]
