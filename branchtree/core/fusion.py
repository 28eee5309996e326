"""Reward fusion: what a node is worth, from the rewards of the leaves below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from branchtree.core.segments import segment_count, segment_max, segment_size, segment_standardised, segment_sum
from branchtree.core.tree import Topology

PathScale = Literal["mean", "sum", "standardised"]

TIE = 2e-6
"""Scores whose deviation is no more than this fraction of their size differ by rounding alone: that of a network in
float32, which is some ten times that of one number (of the small FLUX's leaves at equal latents, up to 1.3e-6)."""


@dataclass(frozen=True)
class NodeValues:
    """Per depth, each node's fused value; a node is valid if a valid leaf lies below it."""

    value: tuple[Tensor, ...]  # per depth (N_d,) float64; 0 where not valid
    valid: tuple[Tensor, ...]  # per depth (N_d,) bool
    # (P,) size of what the leaves' scores were added up from; the largest magnitude among them by default.
    size: Tensor | None = None

    def rounding(self, topology: Topology) -> Tensor:
        """Return the spread (P,) up to which a prompt's values are a tie: the rounding of its scores.

        It follows the scores' size and not their spread: fused values are means of leaves, and may lie close together.
        """
        if self.size is not None:
            return TIE * self.size
        valid = self.valid[-1]
        return TIE * segment_size(self.value[-1][valid], topology.leaf_root[valid], topology.prompts)


def path_log_prob(topology: Topology, log_prob: Sequence[Tensor]) -> list[Tensor]:
    """Per depth (L,) float64: log-density of the path from each leaf's ancestor at that depth down to the leaf."""
    total = torch.zeros(topology.width(topology.steps), dtype=torch.float64)
    paths = [total]
    for depth in range(topology.steps, 0, -1):
        total = total + log_prob[depth].double()[topology.ancestor[depth]]
        paths.append(total)
    return paths[::-1]


def fuse(
    topology: Topology,
    log_prob: Sequence[Tensor],
    rewards: Tensor,
    valid: Tensor,
    beta: float = 1.0,
    scale: PathScale = "mean",
    dimensions: int = 1,
    size: Tensor | None = None,
) -> NodeValues:
    """V(n) = sum over valid leaves l below n of w_l * r_l, w = softmax of beta * log p(path from n to l).

    arXiv 2509.06040, eq. 3. beta = 0 is the uniform mean. ``log_prob`` are the edges' densities averaged over
    ``dimensions`` latent dimensions; ``scale`` says which path density weighs:

    - ``mean``: the averages as they are, the paper's form; nearly uniform when dimensions are many;
    - ``sum``: the true densities; nearly one-hot when dimensions are many;
    - ``standardised``: zero mean and unit sample deviation over the valid leaves below each node.

    ``rewards`` (L,) and ``valid`` (L,); an invalid leaf's reward is never read. ``size`` is that of ``NodeValues``.
    """
    if rewards.shape != valid.shape or rewards.numel() != topology.width(topology.steps):
        raise ValueError(f"{topology.width(topology.steps)} leaves need as many rewards, not {tuple(rewards.shape)}")
    worth = rewards.double()[valid]
    paths = path_log_prob(topology, log_prob)
    values: list[Tensor] = []
    alive: list[Tensor] = []
    for depth in reversed(topology.depths):
        if topology.unbranched(depth):
            # The edge to an only child adds the same density to all paths below: the weights stay as they are.
            values.append(values[-1])
            alive.append(alive[-1])
            continue
        nodes, width = topology.ancestor[depth][valid], topology.width(depth)
        path = _scaled(paths[depth][valid], nodes, width, scale, dimensions)
        weight = _softmax(beta * path, nodes, width)
        values.append(segment_sum(weight * worth, nodes, width))
        alive.append(segment_count(nodes, width) > 0)
    return NodeValues(value=tuple(reversed(values)), valid=tuple(reversed(alive)), size=size)


def _scaled(path: Tensor, nodes: Tensor, width: int, scale: PathScale, dimensions: int) -> Tensor:
    if scale == "mean":
        return path
    if scale == "sum":
        return path * dimensions
    return segment_standardised(path, nodes, width)


def _softmax(logits: Tensor, group: Tensor, groups: int) -> Tensor:
    weight = (logits - segment_max(logits, group, groups)[group]).exp()
    return weight / segment_sum(weight, group, groups)[group]
