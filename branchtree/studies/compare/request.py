"""What a comparison is asked for: its rows, each a recipe and its changes, and how a command says so."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from branchtree.errors import RecipeError
from branchtree.files.names import folder_name
from branchtree.recipe.load import SUFFIXES
from branchtree.recipe.source import parse_value
from branchtree.studies.common.grids import Grid, split_values

KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*(?==)")
OWN_KEYS = {
    "seed": "--seeds",
    "tree.noise_seed": "--seeds",
    "run.iterations": "--iterations or --rows",
}
"""Keys that the comparison itself sets, and the option that does."""


@dataclass(frozen=True)
class Row:
    """A row of the table: a recipe and the keys that it changes beside those that all rows change."""

    name: str
    recipe: str
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
        _require_distinct("row", [row.name for row in self.rows], "name one with RECIPE@name=...")
        _require_distinct("folder", [row.folder.lower() for row in self.rows], "name one with RECIPE@name=...")


def _require_distinct(kind: str, names: Sequence[str], advice: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RecipeError(f"the {kind} '{twice[0]}' comes twice; {advice}")


def parse_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return a command's recipes and its overrides of all rows: the words that begin with ``key=``."""
    overrides = {}
    for word in words:
        if KEY.match(word):
            key, _, value = word.partition("=")
            overrides[key] = parse_value(value, f"override {key}:")
    return [word for word in words if not KEY.match(word)], overrides


def parse_recipe(word: str) -> Row:
    """Read a row from ``RECIPE`` or ``RECIPE@key=value,key=value``; the key ``name`` names the row."""
    recipe, _, changes = word.partition("@")
    overrides: dict[str, Any] = {}
    name = ""
    for change in split_values(changes) if changes else []:
        key, separator, value = change.partition("=")
        if not separator or not key:
            raise RecipeError(f"'{word}': after @ write key=value, several with commas between them")
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
        for combination in itertools.product(*(grid.values for grid in grids)):
            chosen = [(grid.key, *value) for grid, value in zip(grids, combination, strict=True)]
            name = " ".join([row.name, *(f"{key}={written}" for key, written, _ in chosen)])
            multiplied.append(Row(name, row.recipe, {**row.overrides, **{key: value for key, _, value in chosen}}))
    return multiplied


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read seeds as in ``0,1,2``. Raises RecipeError."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise RecipeError(f"seeds '{text}': write whole numbers with commas between them, for example 0,1,2") from None
