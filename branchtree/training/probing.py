"""The probes of an iteration's trees: sampled after the trees, decoded and scored like leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from branchtree.core.probes import Probes, ProbeScores
from branchtree.core.rollout import forwards
from branchtree.core.tree import BranchTree, Topology
from branchtree.errors import RecipeError
from branchtree.plugins.scores import NamedReward
from branchtree.plugins.values import Condition
from branchtree.training.policy import Policy
from branchtree.training.session import Session
from branchtree.training.timing import Stopwatch


@dataclass(frozen=True)
class ProbeRecord:
    """The probes of this process's trees."""

    scores: Mapping[str, ProbeScores] = field(default_factory=dict)  # by the labels of rewards that have a weight
    count: int = 0
    rows: int = 0  # predictions that they took


def probing_forwards(session: Session, topology: Topology) -> int:
    """Return how many forwards the probes of some trees take."""
    probes = Probes.of(topology) if session.credit_rule.baseline == "probe" else None
    return forwards(probes.paths, session.limits.rollout.rows) if probes else 0


def score_probes(
    session: Session, tree: BranchTree, conditions: Sequence[Condition], policy: Policy, watch: Stopwatch
) -> ProbeRecord:
    """Sample, decode and score the probes that the recipe asks for; ``conditions`` (P,) are the trees' prompts.

    Raises RewardError if a reward fails.
    """
    if session.credit_rule.baseline != "probe":
        return ProbeRecord()
    probes = Probes.of(tree.topology)
    rewards = [reward for reward in session.inputs.rewards if reward.weight != 0]
    if not probes:  # other processes own all nodes
        nothing = probes.by_node(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        return ProbeRecord({reward.label: nothing for reward in rewards})
    with watch.phase("probe"):
        latents = probes.sample(policy, session.sampler, tree, session.device, session.limits.rollout.rows)
        roots = probes.root.tolist()
        with session.scorer(background=False, rewards=rewards) as scorer:
            scorer.put(latents, [conditions[root] for root in roots], roots, encoded=policy.encoded(roots))
            found = scorer.finish()
    scores = {label: probes.by_node(each.values.cpu(), each.usable) for label, each in found.items()}
    return ProbeRecord(scores, len(probes), probes.paths.rollout_rows)


def refuse_group_rewards(baseline: str, rewards: Sequence[NamedReward]) -> None:
    """Raise RecipeError if probes are to be scored by a reward that compares a prompt's leaves."""
    whole = [reward.label for reward in rewards if reward.groupwise and reward.weight != 0]
    if baseline == "probe" and whole:
        raise RecipeError(
            f"credit.baseline: probe scores each probe alone, but the reward '{whole[0]}' compares all leaves of a "
            "prompt; set it to group, or give that reward weight 0"
        )
