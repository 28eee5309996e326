"""What a run remembers of the gate of its KL term, and whom it opens for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from branchtree.core.gate import Gate, GateRule, GateState, disagreements, gate_of, gate_weights
from branchtree.core.scores import Scores
from branchtree.core.tree import Topology
from branchtree.plugins.scores import NamedReward
from branchtree.recipe.schema import LossSection
from branchtree.training.processes import Processes, Team


@dataclass
class KlGate:
    """The state of a gate: all processes have the same, and checkpoints keep it."""

    rule: GateRule
    weights: Mapping[str, float]  # of the rewards, by label
    state: GateState = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.rule.start()

    def open(self, processes: Processes, team: Team, topology: Topology, scores: Mapping[str, Scores]) -> Gate:
        """Return the gate of the team's whole trees, and learn from all leaves. All processes call this together.

        ``scores`` are of the leaves of ``topology``.
        """
        teams = processes.everyone(dict(scores))[:: team.members]
        everyone = {label: Scores.concatenate([each[label] for each in teams]) for label in scores}
        disagreement = disagreements(everyone, self.weights)
        self.state = self.rule.observe(self.state, disagreement)
        leaves = topology.width(topology.steps)
        first = sum(len(next(iter(each.values()))) for each in teams[: team.index])
        return gate_of(topology, gate_weights(disagreement, self.state["share"])[first : first + leaves])

    def take_up(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's state, or from the start where it has none."""
        self.state = self.rule.start() if saved is None else dict(saved)

    def figures(self, gate: Gate) -> dict[str, float]:
        """Return an iteration's metrics; ``gate`` is that of all prompts."""
        seen = self.state["seen"]
        figures = {"gate/share": float(gate[-1].mean()), "gate/allowed": float(self.state["share"])}
        return {**figures, "gate/disagreement": seen[-1]} if seen else figures


def make_gate(loss: LossSection, rewards: Sequence[NamedReward]) -> KlGate | None:
    """Return the gate of the KL term; None where it acts on all edges alike."""
    if loss.gate is None:
        return None
    return KlGate(GateRule(loss.gate.share, loss.gate.adapts), {reward.label: reward.weight for reward in rewards})
