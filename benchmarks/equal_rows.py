"""What a budget of denoiser rows buys: `single`, Dense, and 16 trajectories on the small FLUX, several seeds.

A row of the rollout counts as 1, a trained row (forward and backward) as 3. Every variant gets the same prompts,
optimiser and budget, and so as many iterations as the budget allows.

    python benchmarks/equal_rows.py --rows 93760 --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from branchtree import Recipe, load_recipe, train
from branchtree.assembly import make_credit_rule, make_pruning_rule, make_schedule
from branchtree.cost import count
from branchtree.data import PromptOrder, load_conditions
from branchtree.training.metrics import GRADIENT_COST

QUIET = {"run.checkpoint_every": 10**6, "run.sample_every": 10**6, "run.tree_every": 10**6}
VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "16 trajectories": ("quickstart", {"tree.splits": [0], "tree.branches": 16, "tree.siblings": "independent"}),
    "Dense": ("quickstart", {}),
    "single": ("quickstart_single", {}),
}


def iterations_within(recipe: Recipe, rows: int) -> int:
    """How many iterations of a recipe's schedule the budget pays for, at least one."""
    schedule, rule, pruning = make_schedule(recipe), make_credit_rule(recipe), make_pruning_rule(recipe)
    prompts = load_conditions(recipe.data.prompts, recipe.data.column, recipe.data.split)
    order = PromptOrder(len(prompts), recipe.seed, recipe.data.shuffle)
    spent, iteration = 0, 0
    while spent < rows:
        ids = order.batch(iteration, recipe.batch.prompts)
        cost = count([schedule.plan(iteration, prompt_id) for prompt_id in ids], rule, pruning, iteration)
        spent += cost.rollout_rows + GRADIENT_COST * cost.gradient_rows
        iteration += 1
    return max(iteration - 1, 1)


def run_variant(name: str, rows: int, seed: int, folder: Path) -> tuple[int, dict[str, float], float]:
    """Train one variant once: iterations, held-out figures after, seconds."""
    recipe_name, changes = VARIANTS[name]
    overrides = {**QUIET, **changes, "seed": seed, "tree.noise_seed": seed}
    iterations = iterations_within(load_recipe(recipe_name, overrides), rows)
    start = time.perf_counter()
    result = train(recipe_name, {**overrides, "run.iterations": iterations}, output=folder)
    assert result.after is not None
    figures = {label: figure.mean for label, figure in result.after.items() if figure.mean is not None}
    return iterations, figures, time.perf_counter() - start


def main() -> None:
    """Print one line per run and a table of means and standard deviations over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=93_760)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for name in VARIANTS:
                output = Path(folder) / f"{name} {seed}"
                iterations, figures, seconds = run_variant(name, arguments.rows, seed, output)
                results[name].append(figures)
                print(f"seed {seed}  {name:16s} {iterations:4d} iterations {seconds:6.1f} s  {figures}", flush=True)
    for name, runs in results.items():
        for label in runs[0]:
            values = [run[label] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name:16s} {label:10s} {statistics.mean(values):+.3f} +- {spread:.3f}")


if __name__ == "__main__":
    main()
