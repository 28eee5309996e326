"""What a comparison is asked for: its rows, each a recipe and its changes, and how a word names one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from branchtree.errors import RecipeError
from branchtree.files.names import folder_name
from branchtree.recipe import Recipe
from branchtree.recipe.load import SUFFIXES
from branchtree.recipe.source import parse_value
from branchtree.studies.common.grids import Grid, combinations, split_values

OWN_KEYS = {
    "seed": "--seeds",
    "tree.noise_seed": "--seeds",
    "run.iterations": "--iterations or --rows",
}
"""Keys that the comparison itself sets, and the option that does."""
RENAME = "name one with RECIPE@name=..., and a loaded recipe by its own name"


@dataclass(frozen=True)
class Row:
    """A row of the table: a recipe and the keys that it changes beside those that all rows change."""

    name: str
    recipe: str | Recipe  # its name or path, or a loaded one
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name as one folder's name."""
        plain = re.sub(r"[\[\]{}'\"]", "", self.name)
        return folder_name(re.sub(r"[^\w.+=,@-]+", "_", plain).strip("_.")[:120] or "row")


@dataclass(frozen=True)
class Budget:
    """How long every row trains: equally many optimiser steps, or equally many rows through the denoiser.

    ``iterations`` are those of the first row, and fix the optimiser steps of all. ``rows`` are ``rows/equivalent``:
    rows of the rollout, and three times those of the gradient pass. With neither, the first recipe's
    ``run.iterations`` count.
    """

    iterations: int | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None and self.rows is not None:
            raise RecipeError("a comparison is at equal optimiser steps or at equal rows: give one of the two")


@dataclass(frozen=True)
class ComparisonRequest:
    """A whole comparison."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    budget: Budget = Budget()
    shared: Mapping[str, Any] = field(default_factory=dict)  # keys that all rows change
    smoke: bool = False
    title: str = ""

    def __post_init__(self) -> None:
        if not self.rows or not self.seeds:
            raise RecipeError("a comparison needs at least one recipe and one seed")
        for key in [*self.shared, *(key for row in self.rows for key in row.overrides)]:
            if key in OWN_KEYS:
                raise RecipeError(f"{key}: the comparison sets it for every run; use {OWN_KEYS[key]}")
        if any(seed < 0 for seed in self.seeds):
            raise RecipeError(f"seeds are 0 or above, not {min(self.seeds)}")
        _require_distinct("seed", [str(seed) for seed in self.seeds], "list each seed once")
        _require_distinct("row", [row.name for row in self.rows], RENAME)
        _require_distinct("folder", [row.folder.lower() for row in self.rows], RENAME)


def _require_distinct(kind: str, names: Sequence[str], advice: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RecipeError(f"the {kind} '{twice[0]}' comes twice; {advice}")


def parse_recipe(given: str | Path | Recipe) -> Row:
    """Return the row of ``RECIPE`` or ``RECIPE@key=value,key=value``, or of a loaded recipe.

    The key ``name`` names the row. Raises RecipeError.
    """
    if isinstance(given, Recipe):
        return Row(given.name, given)
    recipe, _, changes = str(given).partition("@")
    overrides: dict[str, Any] = {}
    name = ""
    for change in split_values(changes) if changes else []:
        key, separator, value = change.partition("=")
        if not separator or not key:
            raise RecipeError(f"'{given}': after @ write key=value, several with commas between them")
        if key == "name":
            name = value
        else:
            overrides[key] = parse_value(value, f"'{recipe}': override {key}:")
    plain = "+".join(Path(word).stem if word.endswith(SUFFIXES) else word for word in recipe.split("+"))
    return Row(name or (f"{plain} {changes}" if changes else plain), recipe, overrides)


def multiply(rows: Sequence[Row], grids: Sequence[Grid]) -> list[Row]:
    """Return every row with every combination of the grids' values, the last grid varying fastest."""
    multiplied = []
    for row in rows:
        for chosen in combinations(grids):
            name = " ".join([row.name, *(f"{key}={written}" for key, (written, _) in chosen.items())])
            changes = {key: value for key, (_, value) in chosen.items()}
            multiplied.append(Row(name, row.recipe, {**row.overrides, **changes}))
    return multiplied
