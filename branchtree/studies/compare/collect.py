"""What came out: each run's figures from its own files, and each row's over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from branchtree.report.curves import mean
from branchtree.report.read import Evaluation, Run, read_run
from branchtree.studies.compare.budget import nodes_per_leaf
from branchtree.studies.compare.execute import RunOutcome, is_finished
from branchtree.studies.compare.meter import cpu_seconds
from branchtree.studies.compare.runs import PlannedRun, RunPlans
from branchtree.studies.compare.statistics import Difference, SeedSpread, paired_difference, seed_spread

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

    def work(self, key: str) -> SeedSpread | None:
        """A figure of the work, per iteration."""
        return seed_spread([run.work[key] for run in self.finished if key in run.work])

    def over_runs(self, name: str) -> SeedSpread | None:
        """A plain figure of the runs by the name of its field."""
        values = (getattr(run, name) for run in self.finished)
        return seed_spread([float(value) for value in values if value is not None])

    def held_out(self, label: str, when: str) -> dict[int, float]:
        """A held-out figure by seed, ``before`` or ``after``."""
        return {run.seed: getattr(run, when)[label] for run in self.finished if label in getattr(run, when)}


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
        """Whether every run is finished."""
        return all(run.status == "finished" for row in self.rows for run in row.runs)

    def difference(self, row: RowFigures, label: str) -> Difference | None:
        """A row's held-out figure after training minus the first row's, paired by seed."""
        return paired_difference(row.held_out(label, "after"), self.rows[0].held_out(label, "after"))


def collect_results(plans: RunPlans, outcomes: Mapping[tuple[str, int], RunOutcome]) -> Comparison:
    """Read every run. ``outcomes`` are those of the runs that were tried now, by row and seed."""
    rows, read = [], dict[tuple[str, int], Run]()
    for name in dict.fromkeys(run.row for run in plans.runs):
        figures = []
        for planned in plans.of(name):
            key = (name, planned.seed)
            if is_finished(planned):
                run = read_run(planned.folder)
                unlike = _unlike(run, next(iter(read.values()), run))
                if unlike:
                    figures.append(RunFigures(planned.seed, "failed", unlike))
                    continue
                read[key] = run
                figures.append(run_figures(planned, run))
            else:
                outcome = outcomes.get(key)
                status, message = (outcome.status, outcome.message) if outcome else ("waiting", "")
                figures.append(RunFigures(planned.seed, status, message))
        rows.append(RowFigures(name, tuple(figures)))
    return Comparison(tuple(rows), read)


def _unlike(run: Run, first: Run) -> str:
    """Return why a run's held-out figures do not compare with another's; nothing if they do."""
    one, other = (each.evaluations[-1].identity if each.evaluations else None for each in (run, first))
    if one is None or other is None:
        return ""
    different = [key for key in JUDGED_BY if one.get(key) != other.get(key)]
    if not different:
        return ""
    return (
        f"{run.path} was judged by other {' and '.join(different)} than {first.path}; do it again in another --output"
    )


def run_figures(planned: PlannedRun, run: Run) -> RunFigures:
    """The figures of a finished run."""
    work = {key: value for key, metric in WORK.items() if (value := mean(run.metrics, metric)) is not None}
    first, last = (run.evaluations[0], run.evaluations[-1]) if len(run.evaluations) > 1 else (None, None)
    return RunFigures(
        seed=planned.seed,
        status="finished",
        iterations=run.done,
        work={**work, "nodes_per_leaf": nodes_per_leaf(planned.recipe, run.done)},
        row_equivalents=run.metrics[-1].get("rows/total") if run.metrics else None,
        seconds_per_iteration=mean(run.timing, "total"),
        cpu_seconds=cpu_seconds(planned.folder),
        before=_means(first),
        after=_means(last),
    )


def _means(evaluation: Evaluation | None) -> dict[str, float]:
    figures = evaluation.figures if evaluation else {}
    return {label: figure.mean for label, figure in figures.items() if figure.mean is not None}


def as_data(comparison: Comparison) -> Sequence[Mapping[str, Any]]:
    """The comparison as plain data, for compare.json."""
    return [
        {
            "row": row.name,
            "runs": [asdict(run) for run in row.runs],
            "held_out": {label: _held_out(comparison, row, label) for label in comparison.labels},
        }
        for row in comparison.rows
    ]


def _held_out(comparison: Comparison, row: RowFigures, label: str) -> dict[str, Any]:
    before, after = (seed_spread(list(row.held_out(label, when).values())) for when in ("before", "after"))
    figures = {"before": before, "after": after, "difference_to_first": comparison.difference(row, label)}
    return {name: None if figure is None else asdict(figure) for name, figure in figures.items()}
