"""What a comparison of samples is to do, worked out and checked before anything is loaded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from branchtree.data.prompts import check_conditions, load_conditions, media_of, training_conditions
from branchtree.errors import RecipeError
from branchtree.files.names import folder_name
from branchtree.files.writing import require_own_results
from branchtree.plugins.protocols import ModelAdapter
from branchtree.plugins.values import Condition
from branchtree.recipe.build import make_kernel, make_model, make_schedule
from branchtree.recipe.schema import Recipe
from branchtree.studies.common.grids import parse_grid
from branchtree.studies.diversity.sampling import Deal
from branchtree.studies.diversity.spaces import NamedSpace, make_spaces
from branchtree.studies.score.results import check_output

RESULT = "diversity.json"
GRID_SECTIONS = ("tree.", "sampler.")


class SampledSubject(Protocol):
    """What is sampled: the base model of a recipe, or the model of a run's checkpoint."""

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""

    @property
    def run(self) -> Path | None:
        """The run's directory."""

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint's folder; None for the base model."""

    @property
    def iteration(self) -> int | None:
        """How many iterations the checkpoint was trained for."""


Find = Callable[[Mapping[str, Any]], SampledSubject]
"""The subject under overrides of its recipe's keys."""


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


@dataclass(frozen=True)
class Cell:
    """One combination of the grid's values."""

    changes: Mapping[str, Any]
    recipe: Recipe
    deal: Deal

    @property
    def name(self) -> str:
        """The changes as they are written."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items())


@dataclass(frozen=True)
class DiversityRequest:
    """A comparison that can start."""

    subject: SampledSubject
    model: ModelAdapter
    spaces: Sequence[NamedSpace]
    deal: Deal
    cells: Sequence[Cell]
    output: Path
    shared_noise: bool

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.subject.recipe


def make_diversity_request(find: Find, overrides: Mapping[str, Any], choices: DiversityChoices) -> DiversityRequest:
    """Look up plug-ins, read the prompts and have the model check them. Raises a BranchTreeError."""
    found = find(overrides)
    recipe = found.recipe
    output = choices.output or _default_output(found)
    check_output(output / RESULT, [])
    require_own_results(output, (RESULT,), {RESULT: ("discrepancies", "settings")})
    model = make_model(recipe)
    make_kernel(recipe.sampler, model.prediction)  # refuses early what does not suit the model
    spaces = make_spaces(choices.features, model.modality)
    conditions = _conditions(recipe, choices, model)
    cells: list[Cell] = []
    for changes in grid_cells(choices.grid):
        changed = find({**overrides, **changes}).recipe
        make_kernel(changed.sampler, model.prediction)
        cells.append(Cell(changes, changed, _deal(changed, found, conditions, choices)))
    deal = _deal(recipe, found, conditions, choices)
    check_conditions(model, deal.conditions)
    return DiversityRequest(found, model, spaces, deal, cells, output, choices.shared_noise)


def grid_cells(grid: Sequence[str]) -> list[dict[str, Any]]:
    """Return all combinations of the values of ``key=value,value`` words.

    Raises RecipeError for another form, or for a key that is not of ``tree`` or ``sampler``: the model stays loaded.
    """
    grids = [parse_grid(word) for word in grid]
    for each in grids:
        if not each.key.startswith(GRID_SECTIONS):
            raise RecipeError(f"grid '{each.key}': only keys of tree and sampler can vary, and '{each.key}' is none")
    columns = [[(each.key, value) for _, value in each.values] for each in grids]
    return [dict(cell) for cell in itertools.product(*columns)] if columns else []


def _default_output(subject: SampledSubject) -> Path:
    if subject.run is not None:
        return subject.run / "diversity"
    return Path("runs") / f"diversity-{folder_name(subject.recipe.name)}"


def _conditions(recipe: Recipe, choices: DiversityChoices, model: ModelAdapter) -> list[Condition]:
    if choices.prompts is None:
        return training_conditions(recipe.data, model)
    return load_conditions(str(choices.prompts), recipe.data.column, recipe.data.split, media=media_of(model))


def _deal(recipe: Recipe, subject: SampledSubject, conditions: Sequence[Condition], choices: DiversityChoices) -> Deal:
    """Whole groups, at least two of each prompt: the last prompts are left out if there are too many."""
    iteration = subject.iteration or 0
    size = make_schedule(recipe).plan(iteration, 0).leaves
    groups = math.ceil(choices.samples / size)
    if groups < 2:
        raise RecipeError(
            f"{choices.samples} samples are {groups} tree of {size} leaves; at least 2 trees, {2 * size} samples, are "
            "needed to tell trees from what they have in common"
        )
    seed = recipe.seed if choices.seed is None else choices.seed
    return Deal(groups, size, conditions[: groups // 2], seed, iteration)
