"""compare.json: what was asked for, so that a directory is only ever added to, and what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from branchtree.errors import OutputError
from branchtree.files.json_lines import read_json_object
from branchtree.files.writing import write_atomically
from branchtree.recipe import Recipe
from branchtree.studies.compare.request import ComparisonRequest
from branchtree.studies.compare.runs import RunPlans

NAME = "compare.json"
FREE_KEYS = {"name", "description", "seed", "tree.noise_seed", "run.iterations"}
"""Keys of a row's recipe that the comparison sets, or that say nothing."""


def asked(request: ComparisonRequest, plans: RunPlans) -> dict[str, Any]:
    """What a comparison is, as plain data: the budget, the seeds, and every row's resolved recipe."""
    rows = {}
    for row in request.rows:
        recipe = plans.of(row.name)[0].recipe
        rows[row.name] = {"folder": row.folder, "recipe": recipe.model_dump(mode="json")}
    return {"budget": dict(plans.budget), "seeds": list(request.seeds), "rows": rows}


def check(output: Path, now: Mapping[str, Any]) -> None:
    """Refuse a directory that holds another comparison; rows and seeds may have been added.

    Raises OutputError naming what changed.
    """
    path = output / NAME
    if not path.exists():
        return
    try:
        before = read_json_object(path, OutputError)["asked"]
        changes = _changes(before, now)
    except OutputError as error:
        raise OutputError(f"{error}; restore the file, or choose another --output") from None
    except (KeyError, TypeError, ValueError):
        raise OutputError(f"{path}: cannot be read; restore it, or choose another --output") from None
    if changes:
        raise OutputError(
            f"{output}: holds another comparison: {'; '.join(changes)}. Rows and seeds may be added, and nothing else "
            "may change; ask for the same, or choose another --output"
        )


def write(output: Path, now: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Write compare.json, whole or not at all. Raises OutputError if the directory cannot be written to."""
    text = json.dumps({"asked": now, "results": list(results)}, indent=1)
    try:
        write_atomically(output / NAME, text.encode())
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}; choose another --output") from None


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    changes = []
    if before["budget"] != now["budget"]:
        changes.append(f"the budget was {_told(before['budget'])} and is {_told(now['budget'])}")
    gone = [str(seed) for seed in before["seeds"] if seed not in now["seeds"]]
    if gone:
        changes.append(f"seed {', '.join(gone)} is missing")
    for name, row in before["rows"].items():
        if name not in now["rows"]:
            changes.append(f"row '{name}' is missing")
            continue
        keys = _changed_keys(row["recipe"], now["rows"][name]["recipe"])
        if keys:
            changes.append(f"row '{name}' changed in {', '.join(keys)}")
    return changes


def _told(budget: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in budget.items())


def _changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    first, second = _keys(_completed(before)), _keys(now)
    return [key for key in {**first, **second} if key not in FREE_KEYS and first.get(key) != second.get(key)]


def _completed(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe of an earlier version, with the keys that have come since at their defaults."""
    try:
        return Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:
        return recipe


def _keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for section, value in recipe.items():
        keys |= (
            {f"{section}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {section: value}
        )
    return keys
