"""Curves of every row: means over seeds with a band of one standard deviation, against iteration, rows and time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from branchtree.report.curves import ROWS, SMOOTHED_FROM, keys, running_mean, values
from branchtree.report.markup import escape, number
from branchtree.report.plot import SERIES, WIDE, large_ticks, plot, whole_ticks
from branchtree.report.read import Run
from branchtree.studies.compare.collect import Comparison
from branchtree.studies.compare.statistics import seed_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("-", "--", ":", "-.")
AXES = {"iteration": "iteration", "rows": ROWS, "time": "seconds in iterations"}


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


Series = Callable[[Run], list[Point]]


def held_out_charts(comparison: Comparison) -> str:
    """Every held-out figure."""
    charts = [(f"held-{place}", f"Held-out {label}", partial(held_out_points, label=label))
              for place, label in enumerate(comparison.labels)]  # fmt: skip
    return _charts(comparison, charts, "held")


def training_charts(comparison: Comparison) -> str:
    """Every training reward."""
    found = (re.fullmatch(r"reward/(.+)/mean", key) for run in comparison.runs.values() for key in keys(run.metrics))
    labels = dict.fromkeys(match[1] for match in found if match)
    charts = [(f"reward-{place}", f"Training reward {label}", partial(training_points, label=label))
              for place, label in enumerate(labels)]  # fmt: skip
    return _charts(comparison, charts, "reward")


def held_out_points(run: Run, label: str) -> list[Point]:
    """A run's held-out figure at each evaluation, with the rows and seconds spent until then."""
    rows, time = _spent(run)
    points = []
    for evaluation in run.evaluations:
        figure, done = evaluation.figures.get(label), evaluation.iteration
        if figure is not None and figure.mean is not None and done < len(rows):
            points.append(Point(done, rows[done], time[done], figure.mean))
    return points


def training_points(run: Run, label: str) -> list[Point]:
    """A run's training reward of each iteration, as a running mean where there are many."""
    rows, time = _spent(run)
    rewards = values(run.metrics, f"reward/{label}/mean")
    if len(rewards) >= SMOOTHED_FROM:
        rewards = running_mean(rewards, 2 * max(len(rewards) // 40, 1) + 1)
    return [Point(place + 1, rows[place + 1], time[place + 1], reward) for place, reward in enumerate(rewards)]


def _spent(run: Run) -> tuple[list[float], list[float]]:
    """Row equivalents and seconds after 0, 1, ... iterations; NaN from where they are not known."""
    each = (values(run.metrics, "rows/equivalent"), values(run.timing, "total"))
    rows, time = (list(accumulate(figures, initial=0.0)) for figures in each)
    return rows, (time + [math.nan] * len(rows))[: len(rows)]


def curves(comparison: Comparison, series: Series) -> list[Curve | None]:
    """One curve for each row, None for a row without finished runs. Points are matched by their place in the run."""
    found: list[Curve | None] = []
    for row in comparison.rows:
        runs = [series(comparison.runs[row.name, run.seed]) for run in row.finished]
        matched = list(zip(*(points for points in runs if points), strict=False))
        if not matched:
            found.append(None)
            continue
        spreads = [seed_spread([point.y for point in points]) for points in matched]
        x = {axis: [_mean(getattr(point, axis) for point in points) for points in matched] for axis in AXES}
        means = [math.nan if one is None else one.mean for one in spreads]
        stds = [math.nan if one is None or one.std is None else one.std for one in spreads]
        found.append(Curve(row.name, x, means, stds))
    return found


def _mean(figures: Iterator[float]) -> float:
    every = list(figures)
    return sum(every) / len(every)


def _charts(comparison: Comparison, charts: Sequence[tuple[str, str, Series]], group: str) -> str:
    """Figures with a switch of the horizontal axis and one legend."""
    shown = []
    for name, title, series in charts:
        found = curves(comparison, series)
        if any(found):
            views = "".join(_view(name, title, found, axis) for axis in AXES)
            shown.append(f"<figure><figcaption><b>{escape(title)}</b></figcaption>{views}</figure>")
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
    for place, curve in enumerate(found):
        if curve is None:
            continue
        colour, dash = SERIES[place % len(SERIES)], DASHES[place // len(SERIES) % len(DASHES)]
        x, few = curve.x[axis], len(curve.mean) <= 30
        low = [m - s for m, s in zip(curve.mean, curve.std, strict=True)]
        high = [m + s for m, s in zip(curve.mean, curve.std, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(x, curve.mean, color=colour, linestyle=dash, marker="o" if few else "", markersize=3)
    whole_ticks(axes) if axis == "iteration" else large_ticks(axes)


def _legend(comparison: Comparison) -> str:
    """Rows by colour and dash, in the order of the table."""
    entries = (
        f'<span><i class="mark line c{place % len(SERIES)} dash{place // len(SERIES) % len(DASHES)}"></i>'
        f"{escape(row.name)}</span>"
        for place, row in enumerate(comparison.rows)
    )
    return f'<p class="legend">{"".join(entries)}</p>'
