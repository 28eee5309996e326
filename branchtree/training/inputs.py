"""What a recipe names, looked up, read and checked before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from branchtree.core.schedule import Schedule
from branchtree.data.prompts import check_conditions, check_for_rewards, held_out_conditions, training_conditions
from branchtree.plugins.base import Callback
from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.scores import NamedReward
from branchtree.plugins.values import Condition
from branchtree.recipe.build import check_learns, make_callbacks, make_kernel, make_model, make_rewards, make_schedule
from branchtree.recipe.schema import Recipe
from branchtree.run.contents import Contents, evaluation_identity, read_contents


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, checked and read, before any model is loaded."""

    recipe: Recipe
    model: ModelAdapter
    rewards: list[NamedReward]
    held_out: list[NamedReward]
    conditions: list[Condition]
    held_out_conditions: list[Condition]
    schedule: Schedule
    callbacks: list[Callback]

    @cached_property
    def contents(self) -> Contents:
        """Digests of the files that the run reads, as they were when this was first asked for."""
        return read_contents(self.recipe, self.conditions, self.held_out_conditions)

    @cached_property
    def identity(self) -> dict[str, Any] | None:
        """What held-out figures depend on but the trained weights; None without an evaluation."""
        if self.recipe.evaluation is None:
            return None
        return evaluation_identity(self.recipe, self.held_out, len(self.held_out_conditions), self.contents)


def read_inputs(recipe: Recipe) -> Inputs:
    """Look up plug-ins, read prompts and have the model check them. Raises a BranchTreeError naming what is wrong."""
    model = make_model(recipe)
    check_learns(recipe, make_kernel(recipe.sampler, model.prediction))
    section = recipe.evaluation
    rewards = make_rewards(recipe.rewards, ("rewards",), model.modality)
    built = {reward.described: reward.adapter for reward in rewards}
    held_out = make_rewards(section.rewards, ("evaluation", "rewards"), model.modality, built) if section else []
    conditions, unseen = training_conditions(recipe.data, model), held_out_conditions(section, model)
    check_conditions(model, [*conditions, *unseen])
    check_for_rewards([reward.adapter for reward in rewards], conditions)
    check_for_rewards([reward.adapter for reward in held_out], unseen)
    return Inputs(
        recipe=recipe,
        model=model,
        rewards=rewards,
        held_out=held_out,
        conditions=conditions,
        held_out_conditions=unseen,
        schedule=make_schedule(recipe),
        callbacks=make_callbacks(recipe.callbacks),
    )
