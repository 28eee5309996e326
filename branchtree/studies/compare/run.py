"""From a request to runs, and from their files to the table, the page and compare.json.

compare.json holds what was asked for, so that a directory is only ever added to, and what came out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from branchtree.errors import OutputError
from branchtree.files.json_lines import read_json_object
from branchtree.files.reading import require_name
from branchtree.files.writing import require_own_results, write_atomically
from branchtree.planning.noise import compare_noise
from branchtree.recipe import Recipe
from branchtree.report.read import read_run
from branchtree.studies.compare.execute import RunOutcome, is_finished, perform_all
from branchtree.studies.compare.page import render_comparison
from branchtree.studies.compare.plan import PlannedRun, RunPlans, dotted_keys, plan_runs, row_noise
from branchtree.studies.compare.request import OWN_KEYS, ComparisonRequest
from branchtree.studies.compare.results import Comparison, as_data, collect_results
from branchtree.studies.compare.table import figure, markdown

log = logging.getLogger("branchtree")

RECORD, TABLE, PAGE = "compare.json", "compare.md", "compare.html"
FREE_KEYS = {"name", "description", *OWN_KEYS}
"""Keys of a row's recipe that the comparison sets, or that say nothing."""

Asked = Mapping[str, Any]
"""The budget, the seeds, and every row's resolved recipe, as plain data."""


def run_comparison(
    request: ComparisonRequest, output: Path, jobs: int = 1, tell: Callable[[str], None] = lambda line: None
) -> Comparison:
    """Do what is left of a comparison, ``jobs`` runs at a time, and write its table and page into ``output``.

    Each run lives in ``output/ROW/seed_S`` as an ordinary run directory: finished ones are left alone, others go on
    from their last checkpoint. ``tell`` gets a line for every run. A run that fails is named in the result, and the
    others go on. Raises a BranchTreeError if a recipe is wrong or the directory holds another comparison.
    """
    require_name(output, OutputError)
    plans = plan_runs(request, output)
    asked = _asked(request, plans)
    _require_same(output, asked)
    require_own_results(output, (TABLE, PAGE), {RECORD: ("asked",)})
    for warning in compare_noise(row_noise(plans)):
        log.warning("%s", warning)
    left = [run for run in plans.runs if not is_finished(run)]
    if len(left) < len(plans.runs):
        tell(f"{len(plans.runs) - len(left)} of {len(plans.runs)} runs were finished before")
    _write_record(output, asked, [])
    outcomes: dict[tuple[str, int], RunOutcome] = {}

    def ended(run: PlannedRun, outcome: RunOutcome) -> None:
        outcomes[run.row, run.seed] = outcome
        tell(f"[{len(outcomes)}/{len(left)}] {run.row}, seed {run.seed}: {_ending(run, outcome)}")

    perform_all(left, jobs, ended)
    comparison = collect_results(plans, outcomes)
    title, description = request.title or _title(request), _description(request, plans.budget)
    write_atomically(output / TABLE, markdown(comparison, title, description).encode())
    write_atomically(output / PAGE, render_comparison(comparison, title, description).encode())
    _write_record(output, asked, as_data(comparison))
    return comparison


def _title(request: ComparisonRequest) -> str:
    recipes = [row.recipe.name if isinstance(row.recipe, Recipe) else row.recipe for row in request.rows]
    return f"Comparison of {', '.join(dict.fromkeys(recipes))}"


def _description(request: ComparisonRequest, budget: Mapping[str, int]) -> str:
    """Say what is held equal, in a sentence."""
    if "rows" in budget:
        length = f"{budget['rows']} row equivalents (rollout rows + 3 x gradient rows)"
    else:
        length = f"{budget['optimiser_steps']} optimiser steps"
    seeds = ", ".join(map(str, request.seeds))
    shared = " ".join(f"{key}={value}" for key, value in request.shared.items())
    changed = f" All rows: {shared}." if shared else ""
    return f"Every run has {length}, the same prompts and the same evaluation; seeds {seeds}.{changed}"


def _ending(run: PlannedRun, outcome: RunOutcome) -> str:
    """Say how a run ended."""
    if outcome.status != "finished":
        return f"{outcome.status}{f': {outcome.message}' if outcome.message else ''}"
    done = read_run(run.folder)
    seconds = sum(row.get("total") or 0.0 for row in done.timing)
    words = [f"{run.recipe.run.iterations} iterations in {seconds:.1f} s"]
    if done.evaluations:
        first, last = done.evaluations[0].figures, done.evaluations[-1].figures
        for label, after in last.items():
            before = first.get(label)
            if before is not None and before.mean is not None and after.mean is not None:
                words.append(f"{label} {figure(before.mean)} to {figure(after.mean)}")
    return ", ".join(words)


def _asked(request: ComparisonRequest, plans: RunPlans) -> Asked:
    rows = {
        row.name: {"folder": row.folder, "recipe": plans.of(row.name)[0].recipe.model_dump(mode="json")}
        for row in request.rows
    }
    return {"budget": dict(plans.budget), "seeds": list(request.seeds), "rows": rows}


def _write_record(output: Path, asked: Asked, results: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps({"asked": asked, "results": list(results)}, indent=1)
    try:
        write_atomically(output / RECORD, text.encode())
    except OSError as error:
        raise OutputError(f"{output}: cannot be written: {error.strerror}; choose another --output") from None


def _require_same(output: Path, asked: Asked) -> None:
    """Refuse a directory that holds another comparison; rows and seeds may have been added.

    Raises OutputError naming what changed.
    """
    path = output / RECORD
    if not path.exists():
        return
    try:
        changes = _changes(read_json_object(path, OutputError)["asked"], asked)
    except OutputError as error:
        raise OutputError(f"{error}; restore the file, or choose another --output") from None
    except (KeyError, TypeError, ValueError):
        raise OutputError(f"{path}: cannot be read; restore it, or choose another --output") from None
    if changes:
        raise OutputError(
            f"{output}: holds another comparison: {'; '.join(changes)}. Rows and seeds may be added, and nothing else "
            "may change; ask for the same, or choose another --output"
        )


def _changes(before: Asked, asked: Asked) -> list[str]:
    changes = []
    if before["budget"] != asked["budget"]:
        was, now = (
            ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in budget.items())
            for budget in (before["budget"], asked["budget"])
        )
        changes.append(f"the budget was {was} and is {now}")
    missing = [str(seed) for seed in before["seeds"] if seed not in asked["seeds"]]
    if missing:
        changes.append(f"seed {', '.join(missing)} is missing")
    for name, row in before["rows"].items():
        if name not in asked["rows"]:
            changes.append(f"row '{name}' is missing")
            continue
        one, other = dotted_keys(_completed(row["recipe"])), dotted_keys(asked["rows"][name]["recipe"])
        different = [key for key in {**one, **other} if key not in FREE_KEYS and one.get(key) != other.get(key)]
        if different:
            changes.append(f"row '{name}' changed in {', '.join(different)}")
    return changes


def _completed(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe of an earlier version, with the keys that have come since at their defaults."""
    try:
        return Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:
        return recipe
