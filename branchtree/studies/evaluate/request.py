"""What an evaluation is to do, worked out and checked before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.data.prompts import check_conditions, check_for_rewards, held_out_conditions
from branchtree.errors import RecipeError
from branchtree.files.reading import user_path
from branchtree.planning.preflight import require_evaluation_memory
from branchtree.plugins.protocols import LoadsLora, ModelAdapter
from branchtree.plugins.scores import NamedReward
from branchtree.plugins.values import Condition
from branchtree.recipe.build import make_kernel, make_model, make_rewards
from branchtree.recipe.schema import EvaluationSection, Recipe
from branchtree.run.checkpoint import read_state
from branchtree.run.contents import changed_files, read_contents
from branchtree.studies.common.output import check_folder
from branchtree.studies.common.rewards import Spec, make_named
from branchtree.studies.common.subject import Subject

log = logging.getLogger("branchtree")

RESULT = "evaluation.json"
SAMPLES, GRID = "samples.jsonl", "grid"
WRITTEN = (RESULT, SAMPLES, GRID, *(f"{GRID}{ending}" for ending in (".json", ".png", ".mp4", ".safetensors")))
MARKS = {RESULT: ("figures", "settings"), SAMPLES: ("model", "prompt", "noise", "rewards")}
"""Files by which an earlier evaluation is known, and keys that they have."""


@dataclass(frozen=True)
class EvaluationChoices:
    """What a user asks for in place of the recipe's ``evaluation`` section; None leaves what stands there."""

    rewards: Spec | Sequence[Spec] | None = None
    prompts: str | Path | Sequence[str] | None = None
    noises: int | None = None
    limit: int | None = None
    output: Path | None = None
    force: bool = False  # start even where the device's memory is too small by the estimate


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation that can start."""

    subject: Subject
    model: ModelAdapter
    rewards: Sequence[NamedReward]
    conditions: Sequence[Condition]
    section: EvaluationSection  # the recipe's, with the user's choices in it
    output: Path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.subject.recipe


def make_evaluation_request(subject: Subject, choices: EvaluationChoices) -> EvaluationRequest:
    """Look up plug-ins, read the prompts and have the model check them. Raises a BranchTreeError."""
    recipe = subject.recipe
    if recipe.evaluation is None and (choices.rewards is None or choices.prompts is None):
        raise RecipeError(
            f"recipe '{recipe.name}' has no evaluation section; say which rewards and which prompts to use, as in "
            "--reward digits --prompts prompts.txt"
        )
    for name, number in (("noises", choices.noises), ("limit", choices.limit)):
        if number is not None and number < 1:
            raise RecipeError(f"{name}: at least 1 is needed, not {number}")
    model = make_model(recipe)
    if subject.lora is not None and not isinstance(model, LoadsLora):
        raise RecipeError(f"lora: the model '{recipe.model.adapter}' reads no LoRA files; leave it out")
    make_kernel(recipe.sampler, model.prediction)  # refuses early what does not suit the model
    section = _section(recipe, choices)
    if choices.rewards is None:
        rewards = make_rewards(section.rewards, ("evaluation", "rewards"), model.modality)
    else:
        rewards = make_named(choices.rewards, model.modality)
    require_evaluation_memory(recipe, model, rewards, section.rows, choices.force)
    conditions = held_out_conditions(section, model)
    check_conditions(model, conditions)
    check_for_rewards([reward.adapter for reward in rewards], conditions)
    output = choices.output or subject.output("evaluation")
    check_folder(output, WRITTEN, MARKS)
    if subject.checkpoint is not None:
        before = read_state(subject.checkpoint).get("contents", {})
        for change in changed_files(before, read_contents(recipe, [], [])):
            if change.key.startswith("model."):
                log.warning("%s: since then, %s", subject.checkpoint, change)
    return EvaluationRequest(subject, model, rewards, conditions, section, output)


def _section(recipe: Recipe, choices: EvaluationChoices) -> EvaluationSection:
    """Return the recipe's section, or the defaults, with the user's choices in it.

    The user's own prompts are read as the section says, but as a whole and from their own folder.
    """
    section = recipe.evaluation or EvaluationSection.model_construct(prompts=(), rewards=())
    changes: dict[str, Any] = {}
    if choices.noises is not None:
        changes["noises"] = choices.noises
    if choices.limit is not None or choices.prompts is not None:
        changes["limit"] = choices.limit
    if choices.prompts is not None:
        given = choices.prompts
        prompts = str(user_path(given)) if isinstance(given, str | Path) else tuple(given)
        changes |= {"prompts": prompts, "folder": None}
    return section.model_copy(update=changes)
