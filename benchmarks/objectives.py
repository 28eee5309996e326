"""Which objective learns most, on which trees: the commands of that comparison, and its tables from what they wrote.

Six objectives are crossed with three ways of growing a prompt's samples. Each of the 18 searches its learning rate in
the same grid, on a seed of its own. With what it found it then trains on five others, at equal rows; the table at equal
steps has the same runs at an earlier evaluation, so it costs no training.

    python benchmarks/objectives.py commands quickstart --output runs/objectives    # the search, then the comparison
    python benchmarks/objectives.py tables quickstart --output runs/objectives

The second command is complete once the search is: what it found is read from its directory.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from branchtree.report.curves import mean
from branchtree.report.read import Run, read_run
from branchtree.studies.compare.results import Difference, paired_difference, seed_spread
from branchtree.studies.compare.run import RECORD

TREES = ("independent", "dense", "single")
EDGES = {"independent": "dancegrpo", "dense": "branchgrpo", "single": "single"}
LEAVES = {**EDGES, "independent": "ode"}  # forward objectives need no stochastic step, and are published without
OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    "plain": ("loss.clip_range=1e-3",),
    "centred": ("loss.ratio=centred", "loss.clip_range=2e-4"),
    "nft": (),
    "awm": ("loss.clip_range=1e-2",),
    "vgrpo": ("loss.clip_range=1e-2",),
    "crd": (),
}
"""Every objective and the keys that it changes beside its preset.

On `single`, 95% of the ratios of an iteration's second optimiser step lie within each of these clip ranges at the
recipe's learning rate, about; the published ones, 1e-5 to 1e-3 for AWM and V-GRPO, would silence that step.
"""
REFERENCE = "plain/single"
SEARCH_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
SHARED = (
    "optim.steps_per_iteration=2",
    "run.sample_every=null",
    "run.tree_every=null",
    "run.checkpoint_every=1000",
)


@dataclass(frozen=True)
class Task:
    """What is learnt: a recipe, and how it is judged."""

    recipe: str
    figure: str  # of the held-out ones, the one that decides
    also: str  # the other one
    noises: int
    rows: int = 46_880
    iterations: int = 10  # of the table at equal steps: what the dearest method does with these rows
    lr: float = 1e-4  # the recipe's
    factors: tuple[float, ...] = (1.0, 3.0, 10.0)  # of it, that are tried
    single: tuple[str, ...] = ()  # keys that change on `single`


TASKS = {
    task.recipe: task
    for task in (
        Task("quickstart", "log_prob", "accuracy", noises=8),
        # With the recipe's noise in a single step the reader reads most siblings alike; this injects as much as Dense.
        # Ten times the recipe's learning rate unlearns here under every objective that it was tried for.
        Task(
            "ocr_quickstart",
            "other_reader",
            "trained_reader",
            noises=2,
            factors=(0.3, 1.0, 3.0),
            single=("sampler.eta=3.12",),
        ),
    )
}


def cells() -> list[tuple[str, str]]:
    """Return every objective and tree, the reference first: the others are held against it."""
    every = [(objective, tree) for objective in OBJECTIVES for tree in TREES]
    return sorted(every, key=lambda cell: "/".join(cell) != REFERENCE)


def entry(task: Task, objective: str, tree: str, *changes: str) -> str:
    """Return a cell as ``branchtree compare`` takes it."""
    edges = objective in ("plain", "centred")
    recipe = "+".join([task.recipe, *([EDGES[tree]] if edges else [LEAVES[tree], objective])])
    own = [*OBJECTIVES[objective], *(task.single if tree == "single" else ())]
    return f"{recipe}@{','.join([f'name={objective}/{tree}', *own, *changes])}"


def search_command(task: Task, output: Path) -> list[str]:
    """Return the command that tries every learning rate on every cell."""
    rates = ",".join(f"{factor * task.lr:g}" for factor in task.factors)
    budget = ["--rows", str(task.rows), "--seeds", str(SEARCH_SEED), "--grid", f"optim.lr={rates}"]
    entries = [entry(task, *cell) for cell in cells()]
    return ["branchtree", "compare", *entries, *_shared(task), *budget, "--output", str(output / "search")]


def final_command(task: Task, output: Path, rates: Mapping[str, float]) -> list[str]:
    """Return the command that trains every cell at the learning rate that it has found."""
    entries = [
        entry(task, *cell, f"optim.lr={rates['/'.join(cell)]:g}", f"evaluation.every={task.iterations}")
        for cell in cells()
    ]
    budget = ["--rows", str(task.rows), "--seeds", ",".join(map(str, SEEDS))]
    return ["branchtree", "compare", *entries, *_shared(task), *budget, "--output", str(output / "rows")]


def _shared(task: Task) -> list[str]:
    return [*SHARED, f"evaluation.noises={task.noises}"]


def read_runs(comparison: Path) -> dict[str, dict[int, Run]]:
    """Return the finished runs of a comparison by row and seed."""
    record = json.loads((comparison / RECORD).read_text(encoding="utf-8"))
    return {
        row["row"]: {
            run["seed"]: read_run(comparison / record["asked"]["rows"][row["row"]]["folder"] / f"seed_{run['seed']}")
            for run in row["runs"]
            if run["status"] == "finished"
        }
        for row in record["results"]
    }


def held_out(runs: Mapping[int, Run], figure: str, iteration: int | None = None) -> dict[int, float]:
    """Return a held-out figure by seed, after ``iteration`` iterations or at the end."""
    found = {}
    for seed, run in runs.items():
        done = run.done if iteration is None else iteration
        for evaluation in run.evaluations:
            value = evaluation.figures[figure].mean
            if evaluation.iteration == done and value is not None:
                found[seed] = value
    return found


def searched(task: Task, output: Path) -> dict[str, dict[float, float]]:
    """Return what the search reached: for each cell, the figure that decides by learning rate."""
    found: dict[str, dict[float, float]] = {}
    for name, runs in read_runs(output / "search").items():
        for seed, value in held_out(runs, task.figure).items():
            found.setdefault(name.partition(" ")[0], {})[runs[seed].setting("optim", "lr")] = value
    return found


def chosen(task: Task, output: Path) -> dict[str, float]:
    """Return the learning rate of each cell. Raises SystemExit where the search is not finished."""
    found = searched(task, output)
    missing = ["/".join(cell) for cell in cells() if len(found.get("/".join(cell), {})) < len(task.factors)]
    if missing:
        raise SystemExit(f"{output / 'search'}: not finished: {', '.join(missing)}")
    return {cell: max(rates, key=lambda rate: rates[rate]) for cell, rates in found.items()}


def search_table(task: Task, output: Path) -> list[str]:
    """Return the lines of the table of the search; what was chosen is bold."""
    found, best = searched(task, output), chosen(task, output)
    rates = sorted({rate for each in found.values() for rate in each})
    lines = _heading("objective", "tree", *(f"lr {rate:g}" for rate in rates))
    for objective, tree in cells():
        cell = f"{objective}/{tree}"
        shown = {rate: f"{value:.3f}" for rate, value in found[cell].items()}
        shown[best[cell]] = f"**{shown[best[cell]]}**"
        lines.append(_line(objective, tree, *(shown[rate] for rate in rates)))
    return lines


def final_table(task: Task, output: Path, iteration: int | None) -> list[str]:
    """Return the lines of the table after ``iteration`` iterations, or at the end: at equal steps, or at equal rows."""
    every = read_runs(output / "rows")
    reference = held_out(every[REFERENCE], task.figure, iteration)
    against = f"{task.figure} against `plain` on `single`"
    work = ("iterations", "rollout rows", "gradient rows", "rescored rows", "clipped")
    lines = _heading("objective", "tree", "lr", *work, task.also, task.figure, against)
    for name, runs in every.items():
        first = next(iter(runs.values()))
        values = held_out(runs, task.figure, iteration)
        difference = None if name == REFERENCE else paired_difference(values, reference)
        lines.append(
            _line(
                *name.split("/"),
                f"{first.setting('optim', 'lr'):g}",
                _range([run.done for run in runs.values()] if iteration is None else [iteration]),
                *(_mean_of(runs, f"rows/{kind}", 0) for kind in ("rollout", "gradient", "rescored")),
                _mean_of(runs, "ratio/clipped_fraction", 3),
                _spread(held_out(runs, task.also, iteration).values()),
                _spread(values.values()),
                _interval(difference),
            )
        )
    return lines


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _mean_of(runs: Mapping[int, Run], metric: str, digits: int) -> str:
    found = [value for run in runs.values() if (value := mean(run.metrics, metric)) is not None]
    return f"{fmean(found):.{digits}f}" if found else "-"


def _spread(values: Iterable[float]) -> str:
    found = seed_spread(list(values))
    return "-" if found is None or found.std is None else f"{found.mean:.3f} +- {found.std:.3f}"


def _interval(difference: Difference | None) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return "-"
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def _heading(*columns: str) -> list[str]:
    return [_line(*columns), _line(*["---"] * len(columns))]


def _line(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print commands, or the tables of what they wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("commands", "tables"))
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument("--output", type=Path, default=Path("runs/objectives"))
    given = parser.parse_args(arguments)
    task, output = TASKS[given.task], given.output / given.task
    if given.what == "commands":
        print(shlex.join(search_command(task, output)))
        if (output / "search" / RECORD).exists():
            print(shlex.join(final_command(task, output, chosen(task, output))))
        return
    print("\n".join(["Search", *search_table(task, output)]))
    for title, iteration in (("Equal rows", None), ("Equal steps", task.iterations)):
        print("\n".join(["", title, *final_table(task, output, iteration)]))


if __name__ == "__main__":
    main()
