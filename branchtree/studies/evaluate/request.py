"""What an evaluation is to do, worked out and checked before anything is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from branchtree.data.prompts import check_conditions, load_conditions, media_of
from branchtree.errors import RecipeError
from branchtree.files.reading import user_path
from branchtree.files.writing import require_own_results
from branchtree.planning.preflight import require_evaluation_memory
from branchtree.plugins.protocols import LoadsLora, ModelAdapter
from branchtree.plugins.values import Condition
from branchtree.recipe.build import NamedReward, make_kernel, make_model, make_rewards
from branchtree.recipe.schema import EvaluationSection, Recipe
from branchtree.run.contents import changed_files, read_contents
from branchtree.studies.evaluate.subject import Subject
from branchtree.studies.score.results import check_output
from branchtree.studies.score.specs import Spec, make_named
from branchtree.training.checkpoint import read_state

log = logging.getLogger("branchtree")

RESULT = "evaluation.json"
SAMPLES, GRID = "samples.jsonl", "grid"
WRITTEN = (RESULT, SAMPLES, GRID, *(f"{GRID}{ending}" for ending in (".json", ".png", ".mp4")))
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
    lora: str | Path | None = None  # a file or folder, in place of a run's own weights


@dataclass(frozen=True)
class Draws:
    """How many samples are drawn, and how; see training.evaluation.Drawing."""

    noises: int
    rows: int
    seed: int


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation that can start."""

    subject: Subject
    model: ModelAdapter
    rewards: Sequence[NamedReward]
    conditions: Sequence[Condition]
    draws: Draws
    output: Path

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.subject.recipe


def make_evaluation_request(subject: Subject, choices: EvaluationChoices) -> EvaluationRequest:
    """Look up plug-ins, read the prompts and have the model check them. Raises a BranchTreeError."""
    recipe, section = subject.recipe, subject.recipe.evaluation
    if section is None and (choices.rewards is None or choices.prompts is None):
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
    rewards, draws = _rewards(section, choices, model.modality), _draws(section, choices)
    require_evaluation_memory(recipe, model, rewards, draws.rows, choices.force)
    conditions = _conditions(section, choices, model)
    check_conditions(model, conditions)
    output = choices.output or subject.output
    check_output(output / RESULT, [])
    require_own_results(output, WRITTEN, MARKS)
    if subject.checkpoint is not None:
        before = read_state(subject.checkpoint).get("contents", {})
        for change in changed_files(before, read_contents(recipe, [], [])):
            if change.key.startswith("model."):
                log.warning("%s: since then, %s", subject.checkpoint, change)
    return EvaluationRequest(subject, model, rewards, conditions, draws, output)


def _rewards(section: EvaluationSection | None, choices: EvaluationChoices, modality: str) -> list[NamedReward]:
    if choices.rewards is None:
        return make_rewards(section.rewards, ("evaluation", "rewards"), modality) if section else []
    specs = [choices.rewards] if isinstance(choices.rewards, str | Mapping) else list(choices.rewards)
    texts = [spec if isinstance(spec, str) else json.dumps(spec, default=str) for spec in specs]
    named = [replace(reward, described=text) for reward, text in zip(make_named(specs), texts, strict=True)]
    for reward in named:
        if modality not in reward.adapter.modalities:
            scored = ", ".join(sorted(reward.adapter.modalities))
            raise RecipeError(f"reward '{reward.label}' scores {scored}, but the model makes {modality}s")
    return named


def _conditions(section: EvaluationSection | None, choices: EvaluationChoices, model: ModelAdapter) -> list[Condition]:
    """The prompts; files of the user's own are read as the section says, but as a whole and from their own folder."""
    default = EvaluationSection.model_fields
    media = media_of(model)
    column = section.column if section else str(default["column"].default)
    split = section.split if section else str(default["split"].default)
    if choices.prompts is not None:
        asked = choices.prompts
        given = str(user_path(asked)) if isinstance(asked, str | Path) else list(asked)
        return load_conditions(given, column, split, None, "evaluation", media)[: choices.limit]
    if section is None:
        return []
    limit = section.limit if choices.limit is None else choices.limit
    return load_conditions(section.prompts, column, split, section.folder, "evaluation", media)[:limit]


def _draws(section: EvaluationSection | None, choices: EvaluationChoices) -> Draws:
    default = EvaluationSection.model_fields
    keys = {name: getattr(section, name) if section else default[name].default for name in ("noises", "rows", "seed")}
    return Draws(**{**keys, **({} if choices.noises is None else {"noises": choices.noises})})
