"""The comparison as one self-contained page: tables, and curves over iterations, rows and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING

from branchtree.report.curves import ROWS, reward_labels, smoothed, values
from branchtree.report.markup import Titled, escape, fill_page, number, table
from branchtree.report.plot import SERIES, WIDE, large_ticks, plot, whole_ticks
from branchtree.report.read import Run
from branchtree.studies.compare.results import Comparison, seed_spread
from branchtree.studies.compare.table import Sheet, reward_sheet, unfinished, work_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("-", "--", ":", "-.")
AXES = {"iteration": "iteration", "rows": ROWS, "time": "seconds in iterations"}
_HELD_OUT = (
    "Mean and sample standard deviation over seeds. The last column of each figure is the difference to the first row "
    "after training, paired by seed, with its 95% interval by Student's t."
)
_CURVES = "Means over seeds; bands are one standard deviation. Time is that of the iterations, without evaluation."
_TRAINING = "Mean reward of an iteration's leaves, averaged over seeds; of long runs a running mean."
_WORK = (
    "Means over iterations and runs. Nodes per leaf is what the paper calls NFE. CPU seconds are those of a whole run: "
    "iterations, evaluation and samples, but not loading."
)


def render_comparison(comparison: Comparison, title: str, description: str) -> str:
    """Return the page as text. It needs nothing beside itself."""
    runs = [run for row in comparison.rows for run in row.runs]
    done = sum(run.status == "finished" for run in runs)
    status = f'<span class="status open">not finished: {done} of {len(runs)} runs</span>'
    if comparison.complete:
        status = f'<span class="status done">finished: {len(runs)} runs</span>'
    listed = "".join(f"<li>{escape(line)}</li>" for line in unfinished(comparison))
    notes = f'<aside class="notes" aria-label="Runs that are not finished"><ul>{listed}</ul></aside>' if listed else ""
    return fill_page(
        kicker="Comparison",
        title=title,
        status=status,
        head=f'<p class="description">{escape(description)}</p>\n{notes}',
        sections=_sections(comparison),
        origin="the files of the runs",
        style=files("branchtree.studies.compare").joinpath("compare.css").read_text(encoding="utf-8"),
    )


def _sections(comparison: Comparison) -> list[Titled]:
    rewards, work = reward_sheet(comparison), work_sheet(comparison)
    held_out = _table("Held-out figures", rewards) if len(rewards.heads) > 1 else ""
    trained = dict.fromkeys(label for run in comparison.runs.values() for label in reward_labels(run.metrics))
    judged = _charts(comparison, "held", "Held-out", comparison.labels, held_out_points)
    training = _charts(comparison, "reward", "Training reward", list(trained), training_points)
    return [
        ("held-out", "Held-out figures", held_out, _HELD_OUT),
        ("held-out-curves", "Held-out curves", judged, _CURVES),
        ("training", "Training rewards", training, _TRAINING),
        ("work", "Work", _table("Work per iteration", work), _WORK),
    ]


def _table(caption: str, sheet: Sheet) -> str:
    return table(caption, list(map(escape, sheet.heads)), [list(map(escape, row)) for row in sheet.rows])


@dataclass(frozen=True)
class Point:
    """One run at one moment."""

    iteration: float
    rows: float
    time: float
    y: float


@dataclass(frozen=True)
class Curve:
    """A row's mean over its seeds; NaN where a band or an axis has no value."""

    row: str
    x: Mapping[str, list[float]]  # by axis
    mean: list[float]
    std: list[float]


def held_out_points(run: Run, label: str) -> list[Point]:
    """Return a run's held-out figure at each evaluation, with the rows and seconds spent until then."""
    rows, time = _spent(run)
    points = []
    for evaluation in run.evaluations:
        figure, done = evaluation.figures.get(label), evaluation.iteration
        if figure is not None and figure.mean is not None and done < len(rows):
            points.append(Point(done, rows[done], time[done], figure.mean))
    return points


def training_points(run: Run, label: str) -> list[Point]:
    """Return a run's training reward of each iteration, as a running mean where there are many."""
    rows, time = _spent(run)
    rewards = smoothed(values(run.metrics, f"reward/{label}/mean"))
    return [Point(done, rows[done], time[done], reward) for done, reward in enumerate(rewards, 1)]


def _spent(run: Run) -> tuple[list[float], list[float]]:
    """Return row equivalents and seconds after 0, 1, ... iterations; NaN from where they are not known."""
    each = (values(run.metrics, "rows/equivalent"), values(run.timing, "total"))
    rows, time = (list(accumulate(figures, initial=0.0)) for figures in each)
    return rows, (time + [math.nan] * len(rows))[: len(rows)]


def curves(comparison: Comparison, series: Callable[[Run], list[Point]]) -> list[Curve | None]:
    """Return one curve for each row, None for a row without finished runs; points are matched by their order."""
    found: list[Curve | None] = []
    for row in comparison.rows:
        runs = [series(comparison.runs[row.name, run.seed]) for run in row.finished]
        matched = list(zip(*(points for points in runs if points), strict=False))
        if not matched:
            found.append(None)
            continue
        spreads = [seed_spread([point.y for point in points]) for points in matched]
        x = {axis: [fmean(getattr(point, axis) for point in points) for points in matched] for axis in AXES}
        means = [math.nan if one is None else one.mean for one in spreads]
        stds = [math.nan if one is None or one.std is None else one.std for one in spreads]
        found.append(Curve(row.name, x, means, stds))
    return found


def _charts(
    comparison: Comparison, group: str, title: str, labels: Sequence[str], points: Callable[..., list[Point]]
) -> str:
    """Return a figure for each label, with a switch of the horizontal axis and one legend."""
    shown = []
    for index, label in enumerate(labels):
        found = curves(comparison, partial(points, label=label))
        if any(found):
            heading = f"{title} {label}"
            views = "".join(_view(f"{group}-{index}", heading, found, axis) for axis in AXES)
            shown.append(f"<figure><figcaption><b>{escape(heading)}</b></figcaption>{views}</figure>")
    if not shown:
        return ""
    chosen = {"iteration": " checked"}
    switch = "".join(
        f'<label><input type="radio" name="axis-{group}" class="pick-{axis}"{chosen.get(axis, "")}>against {axis}'
        "</label>"
        for axis in AXES
    )
    return (
        f'<div class="switched"><div class="switch" role="radiogroup" aria-label="Horizontal axis">{switch}</div>'
        f'{_legend(comparison)}<div class="charts wide">{"".join(shown)}</div></div>'
    )


def _view(name: str, title: str, found: Sequence[Curve | None], axis: str) -> str:
    ends = "; ".join(
        f"{curve.row} from {number(_finite(curve.mean[0]))} to {number(_finite(curve.mean[-1]))}"
        for curve in found
        if curve is not None
    )
    draw = partial(_draw, found=found, axis=axis)
    svg = plot(f"{name}-{axis}", f"{title} against {axis}: {ends}.", WIDE, AXES[axis], draw)
    return f'<div class="by-{axis}">{svg}</div>'


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _draw(axes: Axes, found: Sequence[Curve | None], axis: str) -> None:
    for index, curve in enumerate(found):
        if curve is None:
            continue
        colour, dash = _line(index)
        x, few = curve.x[axis], len(curve.mean) <= 30
        low = [m - s for m, s in zip(curve.mean, curve.std, strict=True)]
        high = [m + s for m, s in zip(curve.mean, curve.std, strict=True)]
        axes.fill_between(x, low, high, color=SERIES[colour], alpha=0.12, linewidth=0)
        style, marker = DASHES[dash], "o" if few else ""
        axes.plot(x, curve.mean, color=SERIES[colour], linestyle=style, marker=marker, markersize=3)
    whole_ticks(axes) if axis == "iteration" else large_ticks(axes)


def _legend(comparison: Comparison) -> str:
    """Name the rows by colour and dash, in the order of the table."""
    lines = ((*_line(index), escape(row.name)) for index, row in enumerate(comparison.rows))
    entries = (f'<span><i class="mark line c{colour} dash{dash}"></i>{name}</span>' for colour, dash, name in lines)
    return f'<p class="legend">{"".join(entries)}</p>'


def _line(row: int) -> tuple[int, int]:
    """Return a row's colour and dash, by their numbers."""
    return row % len(SERIES), row // len(SERIES) % len(DASHES)
