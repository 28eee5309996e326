"""Processes that share their prompts' trees: each grows, scores and trains a part, and knows the whole's credit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from branchtree.core.families import Families
from branchtree.core.joining import join_levels, join_scores, own_families
from branchtree.core.parts import cut
from branchtree.core.schedule import Schedule, TreePlan
from branchtree.core.scores import Scores
from branchtree.core.tree import Topology, grow, grow_parts
from branchtree.errors import RecipeError
from branchtree.pictures.grid import Thumbnail
from branchtree.recipe.build import NamedReward, make_parts
from branchtree.recipe.schema import Recipe


@dataclass(frozen=True)
class GroupRecord:
    """Some prompts' trees without their states: of a process's part of each, or of the whole."""

    topology: Topology
    log_prob: Sequence[Tensor]  # per depth (N_d,), dimension means
    scores: Mapping[str, Scores]
    thumbnails: Sequence[Thumbnail]  # of the first prompt's leaves, where its tree is recorded


@dataclass(frozen=True)
class Team:
    """The ``members`` processes, of consecutive ranks, that share their prompts' trees; one, where trees are whole."""

    members: int
    member: int  # this process's place in the team
    teams: int
    place: int  # the team's place among the teams

    def share(self, prompts: int) -> slice:
        """The team's run of an iteration's prompts."""
        return slice(prompts * self.place // self.teams, prompts * (self.place + 1) // self.teams)

    def grow(self, plans: Sequence[TreePlan]) -> Topology:
        """The topology of this process's part of each prompt's tree."""
        if self.members == 1:
            return grow(plans)
        return grow_parts([cut(plan, self.members)[self.member] for plan in plans])

    def whole(self, part: GroupRecord) -> GroupRecord:
        """The team's whole trees, from this process's part and the others'; every process must make the call."""
        if self.members == 1:
            return part
        from accelerate.utils import gather_object

        return self.joined(gather_object([part]))

    def joined(self, everyone: Sequence[GroupRecord]) -> GroupRecord:
        """The team's whole trees, from the parts of all processes in the order of ranks: alike on each of its members.

        A node that several members hold has its owner's numbers.
        """
        team = everyone[self.place * self.members : (self.place + 1) * self.members]
        topology, parts = grow(team[0].topology.plans), [record.topology for record in team]
        return GroupRecord(
            topology=topology,
            log_prob=join_levels(topology, parts, [record.log_prob for record in team]),
            scores={
                label: join_scores(topology, parts, [record.scores[label] for record in team])
                for label in team[0].scores
            },
            thumbnails=[thumbnail for record in team for thumbnail in record.thumbnails],
        )

    def own(self, families: Families, whole: Topology, part: Topology) -> Families:
        """Of the whole trees' families what this process trains, by their places in its part."""
        return families if self.members == 1 else own_families(families, whole, part)


def make_team(recipe: Recipe, schedule: Schedule, accelerator: Any) -> Team:
    """This process's team. Raises RecipeError if processes, prompts or leaves cannot be shared out."""
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
    make_parts(recipe, schedule.plan(0, 0))  # every prompt's tree has as many leaves
    rank = accelerator.process_index
    return Team(members, rank % members, teams, rank // members)


def refuse_whole_groups(team: Team, rewards: Sequence[NamedReward]) -> None:
    """Raise RecipeError if trees are shared and a reward must see all of a prompt's leaves together."""
    whole = [reward.label for reward in rewards if reward.groupwise]
    if team.members > 1 and whole:
        raise RecipeError(
            f"batch.processes_per_prompt: the reward '{whole[0]}' compares all leaves of a prompt, but each of "
            f"{team.members} processes has a part of them; set it to 1, or leave the reward out"
        )
