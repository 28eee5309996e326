"""The runs of a comparison: one for each row and seed, with everything but the rows' own keys held equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import RecipeError
from branchtree.recipe import Recipe, load_recipe
from branchtree.studies.compare.budget import iterations_of_steps, iterations_within
from branchtree.studies.compare.request import ComparisonRequest, Row

FREE_EVALUATION = {"every", "rows"}  # how often, and how many at a time, leave each figure as it is


@dataclass(frozen=True)
class PlannedRun:
    """One training run."""

    row: str
    seed: int
    recipe: Recipe
    folder: Path


@dataclass(frozen=True)
class RunPlans:
    """All runs of a comparison, every row's first seed before any row's second."""

    runs: tuple[PlannedRun, ...]
    budget: Mapping[str, int]  # optimiser_steps or rows

    def of(self, row: str) -> list[PlannedRun]:
        """The runs of one row, in the order of the seeds."""
        return [run for run in self.runs if run.row == row]


def plan_runs(request: ComparisonRequest, output: Path) -> RunPlans:
    """Resolve every recipe and give each run its seed, length and folder.

    Raises RecipeError if a recipe is wrong, or if the rows do not share their prompts and their evaluation.
    """
    recipes = {row.name: _load(request, row) for row in request.rows}
    first_name, first = next(iter(recipes.items()))
    for name, recipe in recipes.items():
        _require_same_task(first_name, first, name, recipe)
    budget = _budget(request, first)
    runs = []
    for seed in request.seeds:
        for row in request.rows:
            recipe = _seeded(recipes[row.name], seed)
            recipe = _lasting(recipe, _iterations(recipe, budget, row.name))
            runs.append(PlannedRun(row.name, seed, recipe, output / row.folder / f"seed_{seed}"))
    return RunPlans(tuple(runs), budget)


def _load(request: ComparisonRequest, row: Row) -> Recipe:
    try:
        return load_recipe(row.recipe, {**request.shared, **row.overrides}, smoke=request.smoke)
    except RecipeError as error:
        raise RecipeError(f"row '{row.name}': {error}") from None


def _budget(request: ComparisonRequest, first: Recipe) -> dict[str, int]:
    if request.budget.rows is not None:
        return {"rows": request.budget.rows}
    iterations = request.budget.iterations or first.run.iterations
    return {"optimiser_steps": iterations * first.optim.steps_per_iteration}


def _iterations(recipe: Recipe, budget: Mapping[str, int], name: str) -> int:
    if "rows" in budget:
        return iterations_within(recipe, budget["rows"])
    return iterations_of_steps(recipe, budget["optimiser_steps"], name)


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"seed": seed, "tree": recipe.tree.model_copy(update={"noise_seed": seed})})


def _lasting(recipe: Recipe, iterations: int) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"iterations": iterations})})


def _require_same_task(first_name: str, first: Recipe, name: str, recipe: Recipe) -> None:
    one, other = _task(first), _task(recipe)
    different = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if different:
        raise RecipeError(
            f"'{first_name}' and '{name}' differ in {', '.join(different)}: rows are compared on the same prompts and "
            "by the same evaluation; give these keys to all, as in evaluation.noises=16"
        )


def _task(recipe: Recipe) -> dict[str, Any]:
    """The keys, dotted, of what is learnt from and of how it is judged."""
    dumped = recipe.model_dump(mode="json")
    keys: dict[str, Any] = {f"data.{key}": value for key, value in dumped["data"].items()}
    if dumped["evaluation"] is None:
        return {**keys, "evaluation": None}
    judged = {key: value for key, value in dumped["evaluation"].items() if key not in FREE_EVALUATION}
    return {**keys, **{f"evaluation.{key}": value for key, value in judged.items()}}
