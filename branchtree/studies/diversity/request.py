"""What a study of diversity is to do, worked out and checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from branchtree.data.prompts import check_conditions, load_conditions, media_of, training_conditions
from branchtree.errors import RecipeError
from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.values import Condition
from branchtree.recipe import Recipe, load_recipe
from branchtree.recipe.build import make_kernel, make_model, make_schedule
from branchtree.run.directory import RunDirectory
from branchtree.studies.common.grids import combinations, parse_grid
from branchtree.studies.common.output import check_folder
from branchtree.studies.common.subject import Subject, find_subject
from branchtree.studies.diversity.sampling import BRANCHED, CONTROL, INDEPENDENT, PLAIN, GroupLayout, PlannedSet
from branchtree.studies.diversity.spaces import NamedSpace, make_spaces

RESULT = "diversity.json"
GRID_SECTIONS = ("tree.", "sampler.")


@dataclass(frozen=True)
class DiversityChoices:
    """What a user asks for."""

    samples: int = 4096  # of each set, rounded up to whole groups
    features: Sequence[str] = ("pixels",)
    prompts: Path | None = None  # those of training by default
    grid: Sequence[str] = ()  # "tree.strength=1,2,4,8"
    output: Path | None = None
    seed: int | None = None  # the recipe's by default
    shared_noise: bool = True  # plain samples too come in groups that start from one initial noise
    smoke: bool = False


@dataclass(frozen=True)
class DiversityRequest:
    """A study that can start."""

    subject: Subject
    model: ModelAdapter
    spaces: Sequence[NamedSpace]
    sets: Sequence[
        PlannedSet
    ]  # branched, plain, control, perhaps independent; then a set for each of the grid's values
    output: Path
    shared_noise: bool

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.subject.recipe

    @property
    def layout(self) -> GroupLayout:
        """The groups of the sets that are compared."""
        return self.sets[0].layout


def make_diversity_request(
    run_or_recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None, choices: DiversityChoices
) -> DiversityRequest:
    """Look up plug-ins, read the prompts and have the model check them. Raises a BranchTreeError."""
    subject = find_subject(run_or_recipe, overrides, choices.smoke)
    recipe = subject.recipe
    output = choices.output or subject.output("diversity")
    check_folder(output, (RESULT,), {RESULT: ("discrepancies", "settings")})
    model = make_model(recipe)
    make_kernel(recipe.sampler, model.prediction)  # refuses early what does not suit the model
    spaces = make_spaces(choices.features, model.modality)
    if choices.prompts is None:
        conditions = training_conditions(recipe.data, model)
    else:
        data = recipe.data
        conditions = load_conditions(str(choices.prompts), data.column, data.split, media=media_of(model))
    layout = _layout(recipe, subject, conditions, choices)
    shared = choices.shared_noise
    kinds = [BRANCHED, *(replace(kind, shared=shared) for kind in (PLAIN, CONTROL)), *([INDEPENDENT] if shared else [])]
    sets = [PlannedSet(kind.name, kind, recipe, layout) for kind in kinds]
    source = run_or_recipe if subject.run is None else RunDirectory(subject.run).recipe_file
    for changes in grid_cells(choices.grid):
        changed = load_recipe(source, {**(overrides or {}), **changes}, choices.smoke)
        make_kernel(changed.sampler, model.prediction)
        name = " ".join(f"{key}={value}" for key, value in changes.items())
        sets.append(PlannedSet(name, BRANCHED, changed, _layout(changed, subject, conditions, choices)))
    check_conditions(model, layout.conditions)
    return DiversityRequest(subject, model, spaces, sets, output, shared)


def grid_cells(grid: Sequence[str]) -> list[dict[str, Any]]:
    """Return all combinations of the values of ``key=value,value`` words; none without words.

    Raises RecipeError for another form, or for a key that is not of ``tree`` or ``sampler``: the model stays loaded.
    """
    grids = [parse_grid(word) for word in grid]
    for each in grids:
        if not each.key.startswith(GRID_SECTIONS):
            raise RecipeError(f"grid '{each.key}': only keys of tree and sampler can vary, and '{each.key}' is none")
    if not grids:
        return []
    return [{key: value for key, (_, value) in cell.items()} for cell in combinations(grids)]


def _layout(
    recipe: Recipe, subject: Subject, conditions: Sequence[Condition], choices: DiversityChoices
) -> GroupLayout:
    """Return whole groups, at least two of each prompt: the last prompts are left out if there are too many."""
    iteration = subject.iteration or 0
    size = make_schedule(recipe).plan(iteration, 0).leaves
    groups = math.ceil(choices.samples / size)
    if groups < 2:
        raise RecipeError(
            f"{choices.samples} samples are {groups} tree of {size} leaves; at least 2 trees, {2 * size} samples, are "
            "needed to tell trees from what they have in common"
        )
    seed = recipe.seed if choices.seed is None else choices.seed
    return GroupLayout(groups, size, conditions[: groups // 2], seed, iteration)
