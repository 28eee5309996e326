"""The runs of a comparison: one for each row and seed, with everything but the rows' own keys held equal.

Nothing is loaded or trained to find how many iterations a budget pays for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from branchtree.core.adaptive import plan_ahead
from branchtree.core.cost import GRADIENT_COST, Cost, count
from branchtree.data.prompts import PromptOrder, training_conditions
from branchtree.errors import BranchTreeError, RecipeError
from branchtree.planning.noise import PlannedNoise, planned_noise
from branchtree.recipe import Recipe, load_recipe
from branchtree.recipe.build import make_credit_rule, make_model, make_schedule
from branchtree.studies.compare.request import ComparisonRequest, Row

FREE_KEYS = {"evaluation.every", "evaluation.rows"}
"""How often is judged, and how many samples at a time: that leaves each figure as it is."""


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
    if request.budget.rows is not None:
        budget = {"rows": request.budget.rows}
    else:
        iterations = request.budget.iterations or first.run.iterations
        budget = {"optimiser_steps": iterations * first.optim.steps_per_iteration}
    runs = []
    for seed in request.seeds:
        for row in request.rows:
            recipe = recipes[row.name]
            recipe = recipe.model_copy(
                update={"seed": seed, "tree": recipe.tree.model_copy(update={"noise_seed": seed})}
            )
            length = recipe.run.model_copy(update={"iterations": _iterations(recipe, budget, row.name)})
            recipe = recipe.model_copy(update={"run": length})
            runs.append(PlannedRun(row.name, seed, recipe, output / row.folder / f"seed_{seed}"))
    return RunPlans(tuple(runs), budget)


def _load(request: ComparisonRequest, row: Row) -> Recipe:
    try:
        return load_recipe(row.recipe, {**request.shared, **row.overrides}, smoke=request.smoke)
    except RecipeError as error:
        raise RecipeError(f"row '{row.name}': {error}") from None


def _iterations(recipe: Recipe, budget: Mapping[str, int], name: str) -> int:
    """Return how many iterations a row trains. Raises RecipeError if its steps are no whole number of them."""
    if "rows" in budget:
        return iterations_within(recipe, budget["rows"])
    steps, each = budget["optimiser_steps"], recipe.optim.steps_per_iteration
    if steps % each:
        raise RecipeError(
            f"{steps} optimiser steps are no whole number of iterations of '{name}', which takes {each} in each; "
            "choose other --iterations, or compare at equal --rows"
        )
    return steps // each


def _require_same_task(first_name: str, first: Recipe, name: str, recipe: Recipe) -> None:
    one, other = _task(first), _task(recipe)
    different = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    if different:
        raise RecipeError(
            f"'{first_name}' and '{name}' differ in {', '.join(different)}: rows are compared on the same prompts and "
            "by the same evaluation; give these keys to all, as in evaluation.noises=16"
        )


def _task(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of what is learnt from and of how it is judged."""
    keys = dotted_keys(recipe.model_dump(mode="json"))
    judged = {key: value for key, value in keys.items() if key.partition(".")[0] in {"data", "evaluation"}}
    return {key: value for key, value in judged.items() if key not in FREE_KEYS}


def dotted_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe that is plain data by their dotted keys."""
    keys: dict[str, Any] = {}
    for section, value in recipe.items():
        keys |= {f"{section}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {section: value}
    return keys


def iteration_costs(recipe: Recipe) -> Iterator[Cost]:
    """Yield the cost of iteration 0, 1, ... without end. Raises a BranchTreeError for wrong prompts or rules."""
    schedule, rule = make_schedule(recipe), make_credit_rule(recipe)
    order = PromptOrder(len(training_conditions(recipe.data, make_model(recipe))), recipe.seed, recipe.data.shuffle)
    known: dict[object, Cost] = {}
    iteration = 0
    while True:
        plans = tuple(plan_ahead(schedule, iteration, order.batch(iteration, recipe.batch.prompts)))
        # A pruning window moves every few iterations, and a plug-in's rule may look at each; nothing else does.
        section = recipe.pruning
        key = (plans, iteration if section.rule else iteration // section.every if section.kind == "depth" else 0)
        if key not in known:
            known[key] = count(plans, rule, iteration)
        yield known[key]
        iteration += 1


def iterations_within(recipe: Recipe, rows: int) -> int:
    """Return how many whole iterations a budget of row equivalents pays for, at least one.

    Guidance is counted; masked leaves and ties, which are not foreseen, can only lower what is spent.
    """
    factor = make_model(recipe).rows_per_prediction
    spent = 0
    for iteration, cost in enumerate(iteration_costs(recipe)):
        spent += factor * (cost.rollout_rows + cost.probe_rows + GRADIENT_COST * cost.gradient_rows)
        if spent > rows:
            return max(iteration, 1)
    raise AssertionError("iteration_costs has no end")


def row_noise(plans: RunPlans) -> dict[str, PlannedNoise]:
    """Return what each row injects into a leaf, by its name; rows of which that is not known are left out."""
    found: dict[str, PlannedNoise] = {}
    for run in plans.runs:
        if run.row not in found:
            with suppress(BranchTreeError):  # the run itself will say what is wrong
                noise = planned_noise(run.recipe)
                found |= {run.row: noise} if noise else {}
    return found


def nodes_per_leaf(recipe: Recipe, iterations: int) -> float:
    """Return the paper's "NFE" over that many iterations: nodes of all trees over leaves."""
    costs = list(islice(iteration_costs(recipe), iterations))
    return sum(cost.nodes for cost in costs) / sum(cost.leaves for cost in costs)
