"""Counting work in rows sent through the denoiser: exact, and known before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from branchtree.core.credit import CreditRule, assign_credit
from branchtree.core.probes import Probes
from branchtree.core.schedule import TreePlan
from branchtree.core.scores import Scores
from branchtree.core.tree import grow

GRADIENT_COST = 3
"""A row with its backward pass costs about three forward rows."""


@dataclass(frozen=True)
class Cost:
    """Work of one iteration for some prompts, in predictions; guidance multiplies rows by the adapter's factor."""

    nodes: int
    edges: int
    leaves: int
    rollout_rows: int
    gradient_rows: int
    trained_edges: int
    probes: int = 0  # leaves that are scored beside the tree's
    probe_rows: int = 0

    @property
    def nodes_per_leaf(self) -> float:
        """The paper's "NFE": nodes over leaves."""
        return self.nodes / self.leaves


def count(plans: Sequence[TreePlan], rule: CreditRule, iteration: int) -> Cost:
    """Return the cost of one iteration in which every leaf is valid and no two rewards tie.

    The tree is scored with invented distinct rewards by the very functions that training uses, so these are the
    numbers that a run shows; a masked leaf or a tie can only lower them.
    """
    topology = grow(plans)
    widths = [topology.width(depth) for depth in topology.depths]
    leaves = widths[-1]
    # A fixed irregular sequence: no two leaves, and no two means of groups of leaves, are equal.
    rewards = torch.sin(torch.arange(1, leaves + 1, dtype=torch.float64).square()).float()
    flat = [torch.zeros(width) for width in widths]
    scores = {"made up": Scores(rewards, torch.ones(leaves, dtype=torch.bool))}
    probes = Probes.of(topology) if rule.baseline == "probe" else None
    found = {}
    if probes is not None:
        numbers = torch.cos(torch.arange(1, len(probes) + 1, dtype=torch.float64).square()).float()
        found = {"made up": probes.by_node(numbers, torch.ones(len(probes), dtype=torch.bool))}
    credit = assign_credit(topology, flat, scores, {"made up": 1.0}, rule, iteration, 1, found)
    if rule.draws:
        rows = terms = rule.draws * sum(int(nodes.sum()) for nodes in credit.trained(topology))
    else:
        families = credit.families(topology)
        rows, terms = len(families), families.edges
    return Cost(
        nodes=sum(widths),
        edges=sum(widths) - topology.prompts,
        leaves=leaves,
        rollout_rows=topology.rollout_rows,
        gradient_rows=rows,
        trained_edges=terms,
        probes=len(probes) if probes else 0,
        probe_rows=probes.paths.rollout_rows if probes else 0,
    )
