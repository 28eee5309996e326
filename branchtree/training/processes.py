"""The processes of a run: what they exchange, and teams that share their prompts' trees.

With sharded weights every forward gathers them from all processes and every backward hands gradients out again, so a
process that makes one call fewer than the others leaves them waiting. Before a block of forwards the processes exchange
how many each will make; one that makes fewer takes part in the rest with a row whose result is thrown away
(``Policy.in_step``). A block is finished before anything else is exchanged. With whole weights nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from branchtree.core.gathering import gather_levels, gather_scores
from branchtree.core.schedule import Schedule, TreePlan
from branchtree.core.scores import Scores
from branchtree.core.sharing import cut
from branchtree.core.tree import Topology, grow, grow_shares
from branchtree.errors import BranchTreeError, DataError, RecipeError, RewardError
from branchtree.pictures.grid import Thumbnail
from branchtree.plugins.scores import NamedReward
from branchtree.recipe.build import make_shares
from branchtree.recipe.schema import Recipe
from branchtree.training.objective import AnyWork

Value = TypeVar("Value")


def process_group(minutes: float) -> Any:
    """Return accelerate's settings of the process group: how long a process waits for others in a collective call."""
    from accelerate.utils import InitProcessGroupKwargs

    # The microsecond, since accelerate leaves out a timeout that is its own default, and gloo's default is another.
    return InitProcessGroupKwargs(timeout=timedelta(minutes=minutes, microseconds=1))


@dataclass(frozen=True)
class Processes:
    """The processes of a run. ``joint``: a forward or backward of one is a collective call that all must make."""

    accelerator: Any
    joint: bool

    def most(self, calls: int) -> int:
        """Return the most forwards that any process has to make, this one ``calls``; 0 where each makes its own."""
        return max(self.counts([calls])[:, 0].tolist()) if self.joint else 0

    def counts(self, mine: Sequence[int]) -> Tensor:
        """Return what every process counts, (processes, len(mine)) int64, on the CPU."""
        row = torch.tensor([list(mine)], dtype=torch.int64, device=self.accelerator.device)
        everyone: Tensor = self.accelerator.gather(row)
        return everyone.cpu()

    def everyone(self, mine: Value) -> list[Value]:
        """Return what every process has, in order. All must call this."""
        from accelerate.utils import gather_object

        gathered: list[Value] = gather_object([mine])
        return gathered

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do a block's work; what one process raises is raised on all, so that none waits for one that has ended.

        The work exchanges nothing between processes but the forwards of sharded weights. Where it makes some, only a
        RewardError or DataError is raised on all: after it the forwards that are left must have been made.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.joint and not isinstance(error, RewardError | DataError):
                raise
            failure = error
        found = self.everyone(None if failure is None else _described(failure))
        if failure is not None:
            raise failure
        for kind, message in (each for each in found if each is not None):
            raise kind(message)


def _described(error: Exception) -> tuple[type[BranchTreeError], str]:
    """Return what other processes raise."""
    if isinstance(error, BranchTreeError):
        return type(error), str(error)
    return BranchTreeError, f"another process failed: {type(error).__name__}: {error}"


@dataclass(frozen=True)
class GroupRecord:
    """Some prompts' trees without their states: a process's share of each, or whole trees."""

    topology: Topology
    log_prob: Sequence[Tensor]  # per depth (N_d,), dimension means
    scores: Mapping[str, Scores]
    thumbnails: Sequence[Thumbnail]  # of the first prompt's leaves, where its tree is recorded

    def of(self, prompts: range) -> dict[str, Scores]:
        """Return the scores of some consecutive prompts."""
        leaves = self.topology.block(prompts, self.topology.steps)
        return {label: scores.rows(torch.arange(leaves.start, leaves.stop)) for label, scores in self.scores.items()}


@dataclass(frozen=True)
class Team:
    """The ``members`` processes, of consecutive ranks, that share their prompts' trees; one, where trees are whole."""

    members: int
    member: int  # this process's index in the team
    teams: int
    index: int  # of the team

    def prompts(self, count: int) -> slice:
        """Return which of an iteration's prompts are the team's; they are consecutive."""
        return slice(count * self.index // self.teams, count * (self.index + 1) // self.teams)

    def grow(self, plans: Sequence[TreePlan]) -> Topology:
        """Return the topology of this process's share of each prompt's tree."""
        if self.members == 1:
            return grow(plans)
        return grow_shares([cut(plan, self.members)[self.member] for plan in plans])

    def gather(self, mine: GroupRecord) -> GroupRecord:
        """Return the team's whole trees, from this process's share and the others'. Every process must call this."""
        if self.members == 1:
            return mine
        from accelerate.utils import gather_object

        return self.whole(gather_object([mine]))

    def whole(self, everyone: Sequence[GroupRecord]) -> GroupRecord:
        """Return the team's whole trees, from the shares of all processes in the order of ranks.

        They are alike on each of the team's members. A node that several members hold has its owner's numbers.
        """
        team = everyone[self.index * self.members : (self.index + 1) * self.members]
        topology, shares = grow(team[0].topology.plans), [record.topology for record in team]
        return GroupRecord(
            topology=topology,
            log_prob=gather_levels(topology, shares, [record.log_prob for record in team]),
            scores={
                label: gather_scores(topology, shares, [record.scores[label] for record in team])
                for label in team[0].scores
            },
            thumbnails=[thumbnail for record in team for thumbnail in record.thumbnails],
        )

    def own(self, work: AnyWork, whole: Topology, share: Topology) -> AnyWork:
        """Return that work on the whole trees which this process does, by indices in its share."""
        return work if self.members == 1 else work.owned(whole, share)


def make_team(recipe: Recipe, schedule: Schedule, accelerator: Any) -> Team:
    """Return this process's team. Raises RecipeError if processes, prompts or leaves cannot be shared out."""
    members, processes = recipe.batch.processes_per_prompt, accelerator.num_processes
    if processes % members:
        raise RecipeError(
            f"batch.processes_per_prompt: {processes} processes cannot form teams of {members}; start a multiple of "
            f"{members}, or change the key"
        )
    teams = processes // members
    if recipe.batch.prompts < teams:
        sharers = f"{teams} processes" if members == 1 else f"{teams} teams of {members} processes"
        raise RecipeError(
            f"batch.prompts: {recipe.batch.prompts} prompts cannot be shared by {sharers}; a larger "
            "batch.processes_per_prompt lets several processes share one prompt's tree"
        )
    make_shares(recipe, schedule.plan(0, 0))  # every prompt's tree has as many leaves
    rank = accelerator.process_index
    return Team(members, rank % members, teams, rank // members)


def refuse_whole_groups(team: Team, rewards: Sequence[NamedReward]) -> None:
    """Raise RecipeError if trees are shared and a reward must see all of a prompt's leaves together."""
    whole = [reward.label for reward in rewards if reward.groupwise]
    if team.members > 1 and whole:
        raise RecipeError(
            f"batch.processes_per_prompt: the reward '{whole[0]}' compares all leaves of a prompt, but each of "
            f"{team.members} processes has a share of them; set it to 1, or leave the reward out"
        )
