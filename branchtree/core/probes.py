"""Probes: the deterministic continuations of a tree's inner nodes, each scored like a leaf.

What a probe is worth depends on its node's state alone. Taken from the returns of the edges that leave the node, it is
a baseline that leaves the policy gradient unbiased, whatever it is (Williams, 1992). A difference of two probes in
place of a return (DenseGRPO, arXiv 2601.20218) credits a step with what it alone changed; it is biased, because later
steps are stochastic and the probes' are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from branchtree.core.advantages import Advantages
from branchtree.core.fusion import NodeValues
from branchtree.core.gathering import owned_nodes
from branchtree.core.noise import NoiseSource
from branchtree.core.rollout import Sampler, VelocityFunction, rollout
from branchtree.core.schedule import TreePlan
from branchtree.core.segments import over_spread, segment_std
from branchtree.core.transfer import fetch_rows, send
from branchtree.core.tree import BranchTree, Topology, grow

Returns = Literal["leaf", "step"]

ProbeScores = tuple[Tensor, ...]
"""Per depth (N_d,) what each node's probe is worth; NaN for a node without one, or whose probe could not be scored."""


@dataclass(frozen=True)
class Probes:
    """The nodes of a tree that are probed: those that take a stochastic step; of a shared tree, those owned here."""

    topology: Topology  # of the tree
    nodes: tuple[Tensor, ...]  # per depth but the last (n_d,) int64, ascending
    root: Tensor  # (N,) the prompt of each of all these nodes, by depth

    @staticmethod
    def of(topology: Topology) -> Probes:
        """Return the probes of a tree, or of a share of it."""
        owned = owned_nodes(topology)
        nodes = tuple(torch.nonzero(topology.stochastic(d) & owned[d])[:, 0] for d in topology.depths[:-1])
        return Probes(topology, nodes, torch.cat([topology.root[d][chosen] for d, chosen in enumerate(nodes)]))

    def __len__(self) -> int:
        return len(self.root)

    @cached_property
    def paths(self) -> Topology:
        """The topology of their trajectories, each one a tree without a split that begins at the node's depth."""
        plans = self.topology.plans
        starts = [depth for depth, chosen in enumerate(self.nodes) for _ in range(len(chosen))]
        return grow([_path(plans[root], start) for root, start in zip(self.root.tolist(), starts, strict=True)])

    def sample(
        self, velocity: VelocityFunction, sampler: Sampler, tree: BranchTree, device: torch.device, max_rows: int | None
    ) -> Tensor:
        """Return the clean latents (N, *latent) that the nodes' states lead to without noise.

        The steps and the solver are those of the tree's leaves after their last stochastic step.
        """
        states = [fetch_rows(tree.states[depth], chosen, device) for depth, chosen in enumerate(self.nodes)]

        def own_prompts(latents: Tensor, sigma: Tensor, probe: Tensor) -> Tensor:
            return velocity(latents, sigma, send(self.root, probe.device)[probe])

        nothing_drawn = NoiseSource(0, 0)
        store = tree.leaves.device
        return rollout(
            own_prompts, sampler, self.paths, torch.cat(states), nothing_drawn, range(len(self)), max_rows, store
        ).leaves

    def by_node(self, values: Tensor, valid: Tensor) -> ProbeScores:
        """Return what was found for the probes, (N,) float32 and (N,) bool, by the nodes that they are of."""
        levels = tuple(torch.full((self.topology.width(depth),), torch.nan) for depth in self.topology.depths)
        found = torch.where(valid, values.float(), torch.nan).split([len(chosen) for chosen in self.nodes])
        for level, chosen, own in zip(levels, self.nodes, found, strict=False):
            level[chosen] = own
        return levels


def _path(plan: TreePlan, start: int) -> TreePlan:
    """Return the plan of a deterministic trajectory from a depth on, which skips what the plan's leaves skip."""
    nothing = (False,) * plan.steps
    return TreePlan((1,) * plan.steps, nothing, nothing, plan.skipped | frozenset(range(start)))


def weighted_sum(probes: Mapping[str, ProbeScores], weights: Mapping[str, float]) -> ProbeScores:
    """Return what probes are worth where raw rewards are added with weights."""
    each = [[weights[name] * level.double() for level in levels] for name, levels in probes.items()]
    return tuple(torch.stack(levels).sum(dim=0) for levels in zip(*each, strict=True))


def probe_advantages(
    topology: Topology, values: NodeValues, probes: ProbeScores, returns: Returns, eps: float
) -> Advantages:
    """A(n) = (return of n - probe of its parent) / (sample deviation of the prompt's valid leaves + eps).

    0 for roots, in a prompt whose leaves tie, for nodes without a return and for those whose parent's probe could not
    be scored. The edge of a deterministic step has the advantage of the edge before it.
    """
    valid = values.valid[-1]
    reward, prompt = values.value[-1][valid], topology.leaf_root[valid]
    std = segment_std(reward, prompt, topology.prompts, values.rounding(topology))
    differences = probe_differences(topology, values, probes, returns)
    return tuple(
        over_spread(difference, std[root], eps) for difference, root in zip(differences, topology.root, strict=True)
    )


def probe_differences(
    topology: Topology, values: NodeValues, probes: ProbeScores, returns: Returns
) -> tuple[Tensor, ...]:
    """Return, per depth (N_d,) float64, the return of each node less the probe of its parent.

    The return is the fused value of the node's leaves, or under ``step`` what its own probe is worth.
    """
    known = _values_of(values) if returns == "leaf" else _continued(topology, values, probes)
    differences = [torch.zeros(topology.prompts, dtype=torch.float64)]
    for depth in topology.depths[1:]:
        parent = topology.parent[depth]
        own = known[depth] - probes[depth - 1].double()[parent]
        differences.append(
            torch.where(topology.stochastic(depth - 1)[parent], own.nan_to_num(0.0), differences[-1][parent])
        )
    return tuple(differences)


def _values_of(values: NodeValues) -> list[Tensor]:
    return [torch.where(valid, value, torch.nan) for value, valid in zip(values.value, values.valid, strict=True)]


def _continued(topology: Topology, values: NodeValues, probes: ProbeScores) -> Sequence[Tensor]:
    """Return what each node is worth if it goes on without noise, per depth (N_d,); NaN where that is not known.

    A node that takes a deterministic step goes on as its only child does.
    """
    levels = [_values_of(values)[-1]]
    for depth in reversed(topology.depths[:-1]):
        below = torch.full((topology.width(depth),), torch.nan, dtype=torch.float64)
        below[topology.parent[depth + 1]] = levels[-1]
        levels.append(torch.where(topology.stochastic(depth), probes[depth].double(), below))
    return levels[::-1]
