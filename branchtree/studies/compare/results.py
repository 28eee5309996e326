"""What came out: each run's figures from its own files, and each row's over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from branchtree.core.student import student_quantile
from branchtree.report.curves import mean
from branchtree.report.read import Evaluation, Run, read_run
from branchtree.studies.common.intervals import LEVEL
from branchtree.studies.compare.execute import RunOutcome, cpu_seconds, is_finished
from branchtree.studies.compare.plan import PlannedRun, RunPlans, nodes_per_leaf, row_noise

WORK = {
    "rollout_rows": "rows/rollout",
    "gradient_rows": "rows/gradient",
    "trained_edges": "edges/trained",
    "leaves": "leaves/scored",
}
"""Figures of the table that are means of a metric over a run's iterations."""
JUDGED_BY = ("prompts", "rewards", "weights", "noises", "seed")
"""What the held-out figures of all runs have in common, in the words of their identities."""


@dataclass(frozen=True)
class SeedSpread:
    """Mean and sample standard deviation."""

    mean: float
    std: float | None  # None for one value
    count: int


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its 95% interval by Student's t."""

    mean: float
    low: float | None  # None for one pair
    high: float | None
    pairs: int


def seed_spread(values: Sequence[float]) -> SeedSpread | None:
    """Return the mean and sample standard deviation (n - 1) of some values; None without any."""
    if not values:
        return None
    return SeedSpread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return ``values`` minus ``reference`` over the seeds that both have; None if they share none.

    The interval is mean +- t(n - 1) s / sqrt(n), s being the standard deviation of the differences.
    """
    found = seed_spread([values[seed] - reference[seed] for seed in values if seed in reference])
    if found is None:
        return None
    if found.std is None:
        return Difference(found.mean, None, None, found.count)
    half = student_quantile((1 + LEVEL) / 2, found.count - 1) * found.std / math.sqrt(found.count)
    return Difference(found.mean, found.mean - half, found.mean + half, found.count)


@dataclass(frozen=True)
class RunFigures:
    """One run, finished or not; figures are there once it is finished."""

    seed: int
    status: str  # finished, failed, stopped, waiting
    message: str = ""
    iterations: int = 0
    work: Mapping[str, float] = field(default_factory=dict)  # per iteration
    row_equivalents: float | None = None  # over the whole run
    seconds_per_iteration: float | None = None  # by the clock, evaluation and samples left out
    cpu_seconds: float | None = None  # over the whole run but for loading
    before: Mapping[str, float] = field(default_factory=dict)  # held-out figures by label
    after: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RowFigures:
    """A row over its finished runs."""

    name: str
    runs: tuple[RunFigures, ...]

    @property
    def finished(self) -> list[RunFigures]:
        """The runs that count."""
        return [run for run in self.runs if run.status == "finished"]

    def spread(self, figure: Callable[[RunFigures], float | None]) -> SeedSpread | None:
        """The mean and deviation of a figure over the runs that have it."""
        values = (figure(run) for run in self.finished)
        return seed_spread([float(value) for value in values if value is not None])

    def work(self, key: str) -> SeedSpread | None:
        """A figure of the work, per iteration."""
        return self.spread(lambda run: run.work.get(key))


@dataclass(frozen=True)
class HeldOut:
    """A row's held-out figure before and after training, and the latter minus the first row's, paired by seed."""

    before: SeedSpread | None
    after: SeedSpread | None
    difference_to_first: Difference | None


@dataclass(frozen=True)
class Comparison:
    """All rows; the first is what the others are held against."""

    rows: tuple[RowFigures, ...]
    runs: Mapping[tuple[str, int], Run]  # the finished ones by row and seed, as they lie on disk

    @property
    def labels(self) -> list[str]:
        """Every held-out figure, in the order of first appearance."""
        return list(dict.fromkeys(label for row in self.rows for run in row.finished for label in run.before))

    @property
    def complete(self) -> bool:
        """Return whether every run is finished."""
        return all(run.status == "finished" for row in self.rows for run in row.runs)

    def held_out(self, row: RowFigures, label: str) -> HeldOut:
        """A row's held-out figure over its seeds."""
        after, first = (
            {run.seed: run.after[label] for run in each.finished if label in run.after} for each in (row, self.rows[0])
        )
        before = row.spread(lambda run: run.before.get(label))
        return HeldOut(before, seed_spread(list(after.values())), paired_difference(after, first))


def collect_results(plans: RunPlans, outcomes: Mapping[tuple[str, int], RunOutcome]) -> Comparison:
    """Read every run. ``outcomes`` are those of the runs that were tried now, by row and seed."""
    rows: dict[str, list[RunFigures]] = {run.row: [] for run in plans.runs}
    noise = row_noise(plans)
    read: dict[tuple[str, int], Run] = {}
    for name, figures in rows.items():
        for planned in plans.of(name):
            key = (name, planned.seed)
            if not is_finished(planned):
                outcome = outcomes.get(key, RunOutcome("waiting"))
                figures.append(RunFigures(planned.seed, outcome.status, outcome.message))
                continue
            run = read_run(planned.folder)
            unlike = _unlike(run, next(iter(read.values()), run))
            if unlike:
                figures.append(RunFigures(planned.seed, "failed", unlike))
            else:
                read[key] = run
                injected = {"leaf_noise": noise[name].leaf.total} if name in noise else {}
                figures.append(_run_figures(planned, run, injected))
    return Comparison(tuple(RowFigures(name, tuple(figures)) for name, figures in rows.items()), read)


def _unlike(run: Run, first: Run) -> str:
    """Return why a run's held-out figures do not compare with another's; nothing if they do."""
    one, other = (each.evaluations[-1].identity if each.evaluations else None for each in (run, first))
    if one is None or other is None:
        return ""
    different = [key for key in JUDGED_BY if one.get(key) != other.get(key)]
    reason = f"{run.path} was judged by other {' and '.join(different)} than {first.path}"
    return f"{reason}; do it again in another --output" if different else ""


def _run_figures(planned: PlannedRun, run: Run, injected: Mapping[str, float]) -> RunFigures:
    """Return the figures of a finished run; ``injected`` is the planned noise of a leaf, if it is known."""
    work = {key: value for key, metric in WORK.items() if (value := mean(run.metrics, metric)) is not None}
    first, last = (run.evaluations[0], run.evaluations[-1]) if len(run.evaluations) > 1 else (None, None)
    return RunFigures(
        seed=planned.seed,
        status="finished",
        iterations=run.done,
        work={**work, "nodes_per_leaf": nodes_per_leaf(planned.recipe, run.done), **injected},
        row_equivalents=run.metrics[-1].get("rows/total") if run.metrics else None,
        seconds_per_iteration=mean(run.timing, "total"),
        cpu_seconds=cpu_seconds(planned.folder),
        before=_means(first),
        after=_means(last),
    )


def _means(evaluation: Evaluation | None) -> dict[str, float]:
    figures = evaluation.figures if evaluation else {}
    return {label: figure.mean for label, figure in figures.items() if figure.mean is not None}


def as_data(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the comparison as plain data, for compare.json."""
    return [
        {
            "row": row.name,
            "runs": [asdict(run) for run in row.runs],
            "held_out": {label: asdict(comparison.held_out(row, label)) for label in comparison.labels},
        }
        for row in comparison.rows
    ]
