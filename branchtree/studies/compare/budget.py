"""What an iteration of a recipe costs, and how many iterations a budget pays for; nothing is loaded or trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from branchtree.core.cost import Cost, count
from branchtree.data.prompts import PromptOrder, training_conditions
from branchtree.errors import RecipeError
from branchtree.recipe.build import make_credit_rule, make_model, make_schedule
from branchtree.recipe.schema import Recipe
from branchtree.training.metrics import GRADIENT_COST


def iteration_costs(recipe: Recipe) -> Iterator[Cost]:
    """The cost of iteration 0, 1, ... without end. Raises a BranchTreeError if prompts or rules cannot be had."""
    schedule, rule = make_schedule(recipe), make_credit_rule(recipe)
    order = PromptOrder(len(training_conditions(recipe.data, make_model(recipe))), recipe.seed, recipe.data.shuffle)
    known: dict[object, Cost] = {}
    iteration = 0
    while True:
        plans = tuple(schedule.plan(iteration, prompt) for prompt in order.batch(iteration, recipe.batch.prompts))
        # A pruning window moves every so many iterations, and a plug-in's rule may look at each; nothing else does.
        section = recipe.pruning
        key = (plans, iteration if section.rule else iteration // section.every if section.kind == "depth" else 0)
        if key not in known:
            known[key] = count(plans, rule, iteration)
        yield known[key]
        iteration += 1


def iterations_within(recipe: Recipe, rows: int) -> int:
    """How many whole iterations a budget of row equivalents pays for, at least one.

    Guidance is counted; masked leaves and ties, which are not foreseen, can only lower what is spent.
    """
    factor = make_model(recipe).rows_per_prediction
    spent = 0
    for iteration, cost in enumerate(iteration_costs(recipe)):
        spent += factor * (cost.rollout_rows + GRADIENT_COST * cost.gradient_rows)
        if spent > rows:
            return max(iteration, 1)
    raise AssertionError("iteration_costs has no end")


def iterations_of_steps(recipe: Recipe, steps: int, name: str) -> int:
    """The iterations in which a recipe takes so many optimiser steps. Raises RecipeError if that is no whole number."""
    each = recipe.optim.steps_per_iteration
    if steps % each:
        raise RecipeError(
            f"{steps} optimiser steps are no whole number of iterations of '{name}', which takes {each} in each; "
            "choose other --iterations, or compare at equal --rows"
        )
    return steps // each


def nodes_per_leaf(recipe: Recipe, iterations: int) -> float:
    """The paper's "NFE" over so many iterations: nodes of all trees over leaves."""
    nodes = leaves = 0
    for cost in islice(iteration_costs(recipe), iterations):
        nodes, leaves = nodes + cost.nodes, leaves + cost.leaves
    return nodes / leaves
