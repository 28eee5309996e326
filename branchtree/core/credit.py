"""From leaf rewards to advantages and to the edges that are trained, in the method's order.

Fuse, normalise, then prune. Several rewards are each fused and normalised by themselves and their advantages added
with weights; or their raw values are added first and treated as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from branchtree.core.advantages import Advantages, Estimator, depth_advantages
from branchtree.core.families import Families, collect_families, trained_edges
from branchtree.core.fusion import TIE, NodeValues, PathScale, fuse
from branchtree.core.gate import Gate
from branchtree.core.gathering import looked_up
from branchtree.core.probes import ProbeScores, Returns, probe_advantages, weighted_sum
from branchtree.core.pruning import (
    EdgeMask,
    Prune,
    all_of,
    any_of,
    trainable_edges,
    trainable_leaves,
    trainable_nodes,
    without_ties,
)
from branchtree.core.scores import Scores
from branchtree.core.segments import segment_size, segment_standardised
from branchtree.core.tree import Topology


@dataclass(frozen=True)
class CreditRule:
    """How leaf rewards become advantages, and which edges are left out of the gradient pass."""

    beta: float = 1.0
    scale: PathScale = "mean"
    estimator: Estimator = depth_advantages
    combine: Literal["advantages", "rewards"] = "advantages"
    eps: float = 1e-8
    clip: float = 5.0
    regularised: bool = False  # a KL term acts on every kept edge, so that those without an advantage are trained too
    baseline: Literal["group", "probe"] = "group"  # under probe there is no estimator
    returns: Returns = "leaf"  # under probe
    prune: Prune | None = None  # all edges that the schedule trains are kept by default
    draws: int = 0  # at which a forward objective looks at each leaf; 0 where edges are trained, and not leaves
    inner_nodes: bool = False  # under a forward objective, whether inner nodes are trained too
    whole_groups: bool = False  # leaves without an advantage are trained too, where another of their prompt has one


@dataclass(frozen=True)
class Credit:
    """A scored tree."""

    rewards: Mapping[str, Tensor]  # (L,) float64 by name, of those that have a weight; 0 where not valid
    valid: Tensor  # (L,) bool: none of these rewards failed
    values: Mapping[str, NodeValues]  # by name; one entry where raw rewards are added
    advantages: Advantages  # all rewards together
    keep: EdgeMask  # edges; under a forward objective the nodes that they lead to, without inner_nodes leaves alone
    regularised: bool = False  # whether all that is kept is trained, also without an advantage
    gate: Gate | None = None  # how far a KL term acts on each edge; without a gate on all alike
    weights: Mapping[str, float] = field(default_factory=dict)  # of ``values``, in the advantages

    def trained(self, topology: Topology) -> EdgeMask:
        """Return which edges go through the gradient pass."""
        trained = trained_edges(topology, self.advantages, self.keep, self.regularised)
        return trained if self.gate is None else any_of(trained, _pulled(self.keep, self.gate))

    def families(self, topology: Topology) -> Families:
        """Gather these edges by parent."""
        families = collect_families(topology, self.advantages, self.trained(topology), regularised=True)
        if self.gate is None:
            return families
        return replace(families, gate=looked_up(self.gate, families.edge_depth, families.child).float())

    @staticmethod
    def concatenate(credits: Sequence[Credit]) -> Credit:
        """Return the credit of several runs of prompts, in their order."""
        if len(credits) == 1:
            return credits[0]

        def levels(each: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
            return tuple(torch.cat(level) for level in zip(*each, strict=True))

        first = credits[0]
        values = {}
        for name in first.values:
            given = [credit.values[name] for credit in credits]
            sizes = [value.size for value in given if value.size is not None]
            values[name] = NodeValues(
                value=levels([value.value for value in given]),
                valid=levels([value.valid for value in given]),
                size=torch.cat(sizes) if sizes else None,
            )
        return Credit(
            rewards={name: torch.cat([credit.rewards[name] for credit in credits]) for name in first.rewards},
            valid=torch.cat([credit.valid for credit in credits]),
            values=values,
            advantages=levels([credit.advantages for credit in credits]),
            keep=levels([credit.keep for credit in credits]),
            regularised=first.regularised,
            gate=levels([credit.gate for credit in credits if credit.gate is not None]) if first.gate else None,
            weights=first.weights,
        )


def assign_credit(
    topology: Topology,
    log_prob: Sequence[Tensor],
    scores: Mapping[str, Scores],
    weights: Mapping[str, float],
    rule: CreditRule,
    iteration: int,
    dimensions: int,
    probes: Mapping[str, ProbeScores] | None = None,
    gate: Gate | None = None,
) -> Credit:
    """Score a tree. ``log_prob`` are the edges' densities averaged over ``dimensions`` latent dimensions.

    ``probes`` are what its probes are worth by each reward that has a weight, where they are the baseline. Where a KL
    term has a ``gate``, edges without an advantage are trained only as far as it is open.

    A leaf that any reward marks invalid, or gives a value that is not finite, is masked: it takes no part in fusion
    or normalisation. A reward of weight 0 is left out altogether.
    """
    scores = {name: score for name, score in scores.items() if weights[name] != 0}
    valid = torch.stack([score.usable for score in scores.values()]).all(dim=0)
    nothing = torch.zeros((), dtype=torch.float64)
    rewards = {name: torch.where(valid, score.values.cpu().double(), nothing) for name, score in scores.items()}
    sizes = {name: _size(topology, reward, valid) for name, reward in rewards.items()}
    if rule.combine == "rewards":
        total = torch.stack([weights[name] * reward for name, reward in rewards.items()]).sum(dim=0)
        # Two large scores may cancel out, but not their rounding.
        size = torch.stack([abs(weights[name]) * size for name, size in sizes.items()]).sum(dim=0)
        together = "+".join(rewards)
        probes = {together: weighted_sum(probes, weights)} if probes else None
        rewards, sizes, weights = {together: total}, {together: size}, {together: 1.0}

    def fused(reward: Tensor, size: Tensor | None) -> NodeValues:
        return fuse(topology, log_prob, reward, valid, rule.beta, rule.scale, dimensions, size)

    values = {name: fused(reward, sizes[name]) for name, reward in rewards.items()}
    weighted = []
    for name, value in values.items():
        if probes:
            levels = probe_advantages(topology, value, probes[name], rule.returns, rule.eps)
        else:
            levels = rule.estimator(topology, value, rule.eps)
        weighted.append([weights[name] * level.clamp(-rule.clip, rule.clip) for level in levels])
    advantages = tuple(torch.stack(levels).sum(dim=0) for levels in zip(*weighted, strict=True))
    keep = trainable(topology, valid, rule)
    if rule.prune is not None:
        ranked = [
            weights[name] * standardised(topology, reward, valid, sizes[name]) for name, reward in rewards.items()
        ]
        ranking = sum(ranked, start=nothing)
        keep = all_of(keep, rule.prune(topology, fused(ranking, None), iteration))
    everywhere = rule.regularised and gate is None
    if rule.whole_groups and not everywhere:
        apart = without_ties(topology, keep, advantages)
        keep = apart if gate is None else any_of(apart, _pulled(keep, gate))
    regularised = everywhere or rule.whole_groups
    return Credit(rewards, valid, values, advantages, keep, regularised, gate, {name: weights[name] for name in values})


def trainable(topology: Topology, valid: Tensor, rule: CreditRule) -> EdgeMask:
    """Return what an objective can train: edges, or nodes; ``valid`` (L,) bool says which leaves have a score."""
    if not rule.draws:
        return trainable_edges(topology)
    return trainable_nodes(topology, valid) if rule.inner_nodes else trainable_leaves(topology, valid)


def _pulled(keep: EdgeMask, gate: Gate) -> EdgeMask:
    """Return the kept edges for which the gate is open."""
    return tuple(mask & (level > 0) for mask, level in zip(keep, gate, strict=True))


def standardised(topology: Topology, rewards: Tensor, valid: Tensor, size: Tensor) -> Tensor:
    """Rewards (L,) with zero mean and unit sample deviation over each prompt's valid leaves; 0 where not valid.

    ``size`` (P,) is that of the scores: a prompt whose rewards tie gets 0.
    """
    score = segment_standardised(rewards[valid], topology.leaf_root[valid], topology.prompts, floor=TIE * size)
    return torch.zeros_like(rewards).masked_scatter_(valid, score)


def _size(topology: Topology, rewards: Tensor, valid: Tensor) -> Tensor:
    """Return the largest magnitude among each prompt's valid rewards, (P,)."""
    return segment_size(rewards[valid], topology.leaf_root[valid], topology.prompts)
