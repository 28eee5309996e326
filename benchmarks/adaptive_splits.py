"""Adaptive splits from several noise levels, against drawn and fixed steps, at equal rows: a table, and the choices.

Every run spends the rows that ``--iterations`` of ``single`` take, on the same prompts and with the same optimiser.

    python benchmarks/adaptive_splits.py unicycle --etas 0.5 --steps 6@0.5 9@0.5 --iterations 100 --output runs/adaptive
    python benchmarks/adaptive_splits.py unicycle --output runs/adaptive --draw choices.svg

The first command goes on where it was interrupted. The second only draws, from as many seeds as are done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from branchtree import load_recipe
from branchtree.cli.compare import sheet_table
from branchtree.core.cost import GRADIENT_COST
from branchtree.core.tree import grow
from branchtree.recipe.build import make_schedule
from branchtree.report.curves import running_mean, values
from branchtree.report.read import read_run
from branchtree.studies.compare import Budget, ComparisonRequest, Row, run_comparison
from branchtree.studies.compare.table import reward_sheet, work_sheet

matplotlib.use("svg")

QUIET = {"run.checkpoint_every": 10**6, "run.sample_every": 10**6, "run.tree_every": 10**6}
SINGLE = {"tree.branches": 16, "tree.siblings": "independent", "tree.sde": "splits", "credit.advantage": "leaf"}
SMOOTHED = 11  # iterations; every tree draws its step, so one iteration's mean jumps about


def rows_of(recipe: str, etas: Sequence[float], starts: Sequence[float], steps: Sequence[str]) -> list[Row]:
    """Return ``single`` at the recipe's noise level and at ``etas``, adaptive splits from ``starts``, and fixed steps.

    A fixed step is written ``STEP@ETA``.
    """
    own = load_recipe(recipe).sampler.level
    return [
        Row(f"single, eta {own:g}", f"{recipe}+single"),
        *(Row(f"single, eta {eta:g}", f"{recipe}+single", {"sampler.eta": eta}) for eta in etas),
        *(Row(f"adaptive from {eta:g}", f"{recipe}+adaptive", {"sampler.eta": eta}) for eta in starts),
        *(
            Row(f"step {step}, eta {eta}", recipe, {"tree.splits": [int(step)], "sampler.eta": float(eta), **SINGLE})
            for step, eta in (text.split("@") for text in steps)
        ),
    ]


def shared_keys(recipe: str) -> dict[str, float]:
    """Return what all rows change: they write little, and draw from the steps that the recipe draws from."""
    own = load_recipe(recipe).tree.draw
    return {**QUIET, "tree.draw.first": own.first, "tree.draw.last": own.last}


def budget(recipe: str, iterations: int) -> int:
    """Return the rows that so many iterations of ``single`` take; adaptive splits are allowed as many."""
    single = load_recipe(f"{recipe}+single", shared_keys(recipe))
    schedule, prompts = make_schedule(single), single.batch.prompts
    plans = [schedule.plan(i, prompts * i + j) for i in range(iterations) for j in range(prompts)]
    return grow(plans).rollout_rows + GRADIENT_COST * prompts * iterations


def draw(folders: Sequence[tuple[str, Path]], seeds: int, output: Path) -> None:
    """Draw the noise level and the step that adaptive runs chose, on average over each iteration's trees."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.2), layout="constrained")
    charts = canvas.subplots(1, 2)
    for i, (name, folder) in enumerate(folders):
        done = filter(Path.exists, (folder / f"seed_{seed}" for seed in range(seeds)))
        for j, metrics in enumerate(read_run(path).metrics for path in done):
            steps = running_mean(values(metrics, "split/step"), SMOOTHED)
            for chart, series in zip(charts, (values(metrics, "split/eta"), steps), strict=True):
                style: dict[str, Any] = {"color": f"C{i}", "linewidth": 1, "alpha": 0.7}
                chart.plot(series, label=None if j else name, **style)
    charts[0].set(xlabel="iteration", ylabel="noise level of the split", yscale="log")
    charts[1].set(xlabel="iteration", ylabel=f"step of the split, mean of {SMOOTHED} iterations")
    charts[0].legend(frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(output, metadata={"Date": None})


def main() -> None:
    """Print one line per run and tables over seeds; or draw what finished runs chose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--etas", type=float, nargs="*", default=[], help="more noise levels of drawn steps")
    parser.add_argument("--starts", type=float, nargs="*", default=[0.3, 3.0], help="where adaptive noise levels start")
    parser.add_argument("--steps", nargs="*", default=[], metavar="STEP@ETA", help="fixed steps to compare with")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--draw", type=Path, help="draw the choices into this file, and train nothing")
    asked = parser.parse_args()
    rows = rows_of(asked.recipe, asked.etas, asked.starts, asked.steps)
    if asked.draw is not None:
        adaptive = [(row.name, asked.output / row.folder) for row in rows if "adaptive" in row.recipe]
        draw(adaptive, asked.seeds, asked.draw)
        return
    rows_each = Budget(rows=budget(asked.recipe, asked.iterations))
    request = ComparisonRequest(tuple(rows), tuple(range(asked.seeds)), rows_each, shared_keys(asked.recipe))
    comparison = run_comparison(request, asked.output, asked.jobs, lambda line: print(line, flush=True))
    console = Console(highlight=False)
    for sheet in (*work_sheet(comparison).split(6), *reward_sheet(comparison).split(3)):
        console.print(sheet_table(sheet))


if __name__ == "__main__":
    main()
