"""The table, as rows of plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from branchtree.studies.compare.results import Comparison, Difference, RowFigures, SeedSpread

MISSING = "-"


@dataclass(frozen=True)
class Sheet:
    """Heads and rows of text; the first column names the rows."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def split(self, columns: int) -> list[Sheet]:
        """Return sheets of at most ``columns`` beside the names, for where there is no room for all."""
        cuts = [slice(start, start + columns) for start in range(1, len(self.heads), columns)]
        return [
            Sheet((self.heads[0], *self.heads[cut]), tuple((row[0], *row[cut]) for row in self.rows)) for cut in cuts
        ]


def work_sheet(comparison: Comparison) -> Sheet:
    """Return what each row does and what it takes, per iteration unless it says otherwise."""
    work = {
        "rollout rows": "rollout_rows",
        "gradient rows": "gradient_rows",
        "trained edges": "trained_edges",
        "leaves": "leaves",
        "nodes / leaf": "nodes_per_leaf",
        "noise / leaf": "leaf_noise",
    }
    rows = [
        (
            row.name,
            _runs(row),
            _range([run.iterations for run in row.finished]),
            *(_mean(row.work(key)) for key in work.values()),
            _mean(row.spread(lambda run: run.seconds_per_iteration)),
            _mean(row.spread(lambda run: run.cpu_seconds)),
        )
        for row in comparison.rows
    ]
    return Sheet(("row", "runs", "iter.", *work, "s / iter.", "CPU s"), tuple(rows))


def reward_sheet(comparison: Comparison, labels: Sequence[str] | None = None) -> Sheet:
    """Return held-out figures before and after, mean +- deviation over seeds, and the difference to the first row."""
    labels, heads = comparison.labels if labels is None else labels, ["row"]
    for label in labels:
        heads += [f"{label} before", f"{label} after", f"{label} against the first row, 95% interval"]
    rows = []
    for row in comparison.rows:
        cells = [row.name]
        for label in labels:
            found = comparison.held_out(row, label)
            difference = None if row is comparison.rows[0] else found.difference_to_first
            cells += [_mean_and_std(found.before), _mean_and_std(found.after), _difference(difference)]
        rows.append(tuple(cells))
    return Sheet(tuple(heads), tuple(rows))


def unfinished(comparison: Comparison) -> list[str]:
    """Return a line for each run that is not finished."""
    return [
        f"{row.name}, seed {run.seed}: {run.status}{f': {run.message}' if run.message else ''}"
        for row in comparison.rows
        for run in row.runs
        if run.status != "finished"
    ]


def markdown(comparison: Comparison, title: str, description: str) -> str:
    """Return a page with one table of everything."""
    work, rewards = work_sheet(comparison), reward_sheet(comparison)
    heads = (*work.heads, *rewards.heads[1:])
    rows = [(*one, *other[1:]) for one, other in zip(work.rows, rewards.rows, strict=True)]
    lines = [f"# {title}", "", description, "", _line(heads), _line(["---"] * len(heads)), *map(_line, rows)]
    if missing := unfinished(comparison):
        lines += ["", "Not finished:", "", *(f"- {' '.join(line.split())}" for line in missing)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _runs(row: RowFigures) -> str:
    done, failed = len(row.finished), sum(run.status == "failed" for run in row.runs)
    whole = f"{done}" if done == len(row.runs) else f"{done} of {len(row.runs)}"
    return f"{whole}, {failed} failed" if failed else whole


def _range(values: Sequence[int]) -> str:
    if not values:
        return MISSING
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _mean(found: SeedSpread | None) -> str:
    return MISSING if found is None else figure(found.mean)


def _mean_and_std(found: SeedSpread | None) -> str:
    if found is None:
        return MISSING
    return figure(found.mean) if found.std is None else f"{figure(found.mean)} +- {figure(found.std)}"


def _difference(found: Difference | None) -> str:
    if found is None:
        return MISSING
    interval = "" if found.low is None or found.high is None else f" [{found.low:+.4g}, {found.high:+.4g}]"
    return f"{found.mean:+.4g}{interval}"


def figure(value: float) -> str:
    """Return a number to four significant digits; whole numbers in full."""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
