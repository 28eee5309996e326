"""From a request to runs, and from their files to the table and the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from branchtree.errors import OutputError
from branchtree.files.reading import require_name
from branchtree.files.writing import require_own_results, write_atomically
from branchtree.studies.compare import record
from branchtree.studies.compare.collect import Comparison, as_data, collect_results
from branchtree.studies.compare.execute import RunOutcome, is_finished, perform_all
from branchtree.studies.compare.page import render_comparison
from branchtree.studies.compare.request import ComparisonRequest
from branchtree.studies.compare.runs import PlannedRun, plan_runs
from branchtree.studies.compare.table import figure, markdown

TABLE, PAGE = "compare.md", "compare.html"

Tell = Callable[[str], None]


def run_comparison(
    request: ComparisonRequest, output: Path, jobs: int = 1, tell: Tell = lambda line: None
) -> Comparison:
    """Do what is left of a comparison, ``jobs`` runs at a time, and write its table and page into ``output``.

    Each run lives in ``output/ROW/seed_S`` as an ordinary run directory: finished ones are left alone, others go on
    from their last checkpoint. ``tell`` gets a line for every run. A run that fails is told of in the result, and the
    others go on. Raises a BranchTreeError if a recipe is wrong or the directory holds another comparison.
    """
    require_name(output, OutputError)
    plans = plan_runs(request, output)
    now = record.asked(request, plans)
    record.check(output, now)
    require_own_results(output, (TABLE, PAGE), {record.NAME: ("asked",)})
    left = [run for run in plans.runs if not is_finished(run)]
    if len(left) < len(plans.runs):
        tell(f"{len(plans.runs) - len(left)} of {len(plans.runs)} runs were finished before")
    record.write(output, now, [])
    outcomes: dict[tuple[str, int], RunOutcome] = {}

    def ended(run: PlannedRun, outcome: RunOutcome) -> None:
        outcomes[run.row, run.seed] = outcome
        tell(f"[{len(outcomes)}/{len(left)}] {_line(run, outcome)}")

    perform_all(left, jobs, ended)
    comparison = collect_results(plans, outcomes)
    title, told = request.title or _title(request), _told(request, plans.budget)
    write_atomically(output / TABLE, markdown(comparison, title, told).encode())
    write_atomically(output / PAGE, render_comparison(comparison, title, told).encode())
    record.write(output, now, as_data(comparison))
    return comparison


def _title(request: ComparisonRequest) -> str:
    recipes = dict.fromkeys(row.recipe for row in request.rows)
    return f"Comparison of {', '.join(recipes)}"


def _told(request: ComparisonRequest, budget: Mapping[str, int]) -> str:
    """What is held equal, in a sentence."""
    if "rows" in budget:
        length = f"{budget['rows']} row equivalents (rollout rows + 3 x gradient rows)"
    else:
        length = f"{budget['optimiser_steps']} optimiser steps"
    seeds = ", ".join(str(seed) for seed in request.seeds)
    shared = " ".join(f"{key}={value}" for key, value in request.shared.items())
    changed = f" All rows: {shared}." if shared else ""
    return f"Every run has {length}, the same prompts and the same evaluation; seeds {seeds}.{changed}"


def _line(run: PlannedRun, outcome: RunOutcome) -> str:
    """How a run ended."""
    name = f"{run.row}, seed {run.seed}"
    if outcome.status != "finished":
        return f"{name}: {outcome.status}{f': {outcome.message}' if outcome.message else ''}"
    from branchtree.report.read import read_run

    done = read_run(run.folder)
    seconds = sum(row.get("total") or 0.0 for row in done.timing)
    changes = []
    if done.evaluations:
        for label, after in done.evaluations[-1].figures.items():
            before = done.evaluations[0].figures.get(label)
            if before is not None and before.mean is not None and after.mean is not None:
                changes.append(f"{label} {figure(before.mean)} to {figure(after.mean)}")
    return f"{name}: {run.recipe.run.iterations} iterations in {seconds:.1f} s{''.join(f', {c}' for c in changes)}"
