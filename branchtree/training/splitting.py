"""What a run remembers of its splits, where their rule learns from scored trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from branchtree.core.adaptive import LearnsSplits, State, plan_learned
from branchtree.core.credit import Credit
from branchtree.core.schedule import Schedule, TreePlan
from branchtree.core.tree import Topology, grow
from branchtree.data.prompts import PromptOrder
from branchtree.errors import CheckpointError
from branchtree.training.processes import Processes, Team


@dataclass
class SplitLearner:
    """The state of a rule of splits that learns: all processes have the same, and checkpoints keep it."""

    schedule: Schedule
    rule: LearnsSplits
    order: PromptOrder
    prompts: int  # of an iteration, over all processes
    most_noise: float  # of a split, over the kernel's own
    state: State = field(init=False)

    def __post_init__(self) -> None:
        self.state = self.rule.start()

    def plans(self, iteration: int) -> list[TreePlan]:
        """Return the plans of an iteration's prompts, over all processes."""
        ids = self.order.batch(iteration, self.prompts)
        return plan_learned(self.schedule, self.state, iteration, ids, self._indices(ids), self.most_noise)

    def observe(self, iteration: int, processes: Processes, team: Team, topology: Topology, credit: Credit) -> None:
        """Learn from an iteration's trees. All processes call this together.

        ``topology`` and ``credit`` are of the team's whole trees.
        """
        teams = processes.everyone((topology.plans, credit))[:: team.members]
        whole = grow([plan for plans, _ in teams for plan in plans])
        joint = Credit.concatenate([each for _, each in teams])
        ids = self.order.batch(iteration, self.prompts)
        self.state = self.rule.observe(self.state, self._indices(ids), whole, joint.values, joint.weights)

    def take_up(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint's state, or from the start without one. Raises CheckpointError for another rule's."""
        if saved is None:
            self.state = self.rule.start()
            return
        if saved.keys() != self.rule.start().keys():
            raise CheckpointError("what it remembers of splits is another rule's")
        self.state = dict(saved)

    def _indices(self, ids: Sequence[int]) -> list[int]:
        return [self.order.index(prompt_id) for prompt_id in ids]


def make_split_learner(schedule: Schedule, order: PromptOrder, prompts: int, most_noise: float) -> SplitLearner | None:
    """Return the state of a schedule's rule; None where it does not learn."""
    rule = schedule.splits
    return SplitLearner(schedule, rule, order, prompts, most_noise) if isinstance(rule, LearnsSplits) else None
