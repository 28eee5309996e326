"""Charts of training: rewards, signals of the update, and credit and loss by depth."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from branchtree.report.markup import escape, number
from branchtree.report.plot import SERIES, SMALL, WIDE, large_ticks, lines, plot, whole_ticks
from branchtree.report.read import Evaluation, LogRow, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = "row equivalents (rollout + 3 \N{MULTIPLICATION SIGN} gradient)"
SMOOTHED_FROM = 40  # iterations; shorter runs are shown without a running mean


@dataclass(frozen=True)
class Signal:
    """A small chart: its title, its metrics, and how to read it."""

    title: str
    keys: tuple[str, ...]
    meaning: str


SIGNALS = (
    Signal("Loss", ("loss",), "The clipped objective; near 0 by construction, it does not measure progress."),
    Signal("Gradient norm", ("grad_norm",), "Before clipping to the recipe's largest norm."),
    Signal(
        "Clipped edges",
        ("ratio/clipped_fraction",),
        "Fraction of the trained edges whose gradient the clip, or the mask by divergence, removes.",
    ),
    Signal("Ratio deviation", ("ratio/max_deviation",), "Largest distance of a likelihood ratio from 1."),
    Signal(
        "Log-density mismatch",
        ("log_prob/mismatch_mean", "log_prob/mismatch_max"),
        "Between the densities of the rollout and of the gradient pass: mean and largest.",
    ),
    Signal("Split step", ("split/step",), "Where trees split, on average, as their rule learnt."),
    Signal("Noise of the split", ("split/eta",), "Its level eta, on average, as the rule of splits learnt."),
    Signal("Children of a split", ("split/children",), "On average over the iteration's prompts."),
    Signal("Gated leaves", ("gate/share",), "Share of an iteration's leaves that the KL term acts on."),
    Signal("Error at noised leaves", ("forward/error",), "Mean square error of a forward objective's predictions."),
    Signal("Learning rate", ("lr",), "As the schedule set it."),
    Signal("Valid rewards", ("reward/valid_fraction",), "Fraction of the leaves on which no reward failed."),
    Signal(
        "Rows per iteration",
        ("rows/rollout", "rows/gradient"),
        "Rows sent through the denoiser: in the rollout, and in the gradient pass.",
    ),
)


def reward_charts(run: Run) -> str:
    """Return charts of the training rewards against iterations and, where rows are recorded, against rows."""
    labels = reward_labels(run.metrics)
    by_rows = sum(row.get("rows/total") is not None for row in run.metrics) > 1
    charts = []
    for index, label in enumerate(labels):
        views = [_reward(run, label, index, "iteration", "iteration")]
        if by_rows:
            views.append(_reward(run, label, index, "rows/total", ROWS))
        charts.append(f"<figure><figcaption><b>{escape(label)}</b></figcaption>{''.join(views)}</figure>")
    if not charts:
        return ""
    switch = _SWITCH if by_rows else ""
    many = len(run.metrics) >= SMOOTHED_FROM
    keys_ = [(0, "line", f"running mean over {_window(len(run.metrics))} iterations" if many else "mean")]
    keys_ += [(0, "faint", "mean of an iteration's leaves")] if many else []
    keys_ += [(0, "band", "mean \N{PLUS-MINUS SIGN} standard deviation of the leaves")]
    return f'<div class="switched">{switch}{_legend(keys_)}<div class="charts wide">{"".join(charts)}</div></div>'


_SWITCH = (
    '<div class="switch" role="radiogroup" aria-label="Horizontal axis of the reward curves">'
    '<label><input type="radio" name="axis" class="pick-iteration" checked>against iterations</label>'
    '<label><input type="radio" name="axis" class="pick-rows">against rows</label></div>'
)


def _reward(run: Run, label: str, index: int, against: str, xlabel: str) -> str:
    x = values(run.metrics, against)
    mean, std = values(run.metrics, f"reward/{label}/mean"), values(run.metrics, f"reward/{label}/std")

    def draw(axes: Axes) -> None:
        low = [m - s for m, s in zip(mean, std, strict=True)]
        high = [m + s for m, s in zip(mean, std, strict=True)]
        axes.fill_between(x, low, high, color=SERIES[0], alpha=0.16, linewidth=0)
        many = len(mean) >= SMOOTHED_FROM
        lines(axes, x, mean, 0, faint=many)
        if many:
            lines(axes, x, smoothed(mean), 0)
        whole_ticks(axes) if against == "iteration" else large_ticks(axes)

    kind = "iteration" if against == "iteration" else "rows"
    alt = f"Training reward {label} against {kind}: {_in_words(mean)}."
    return f'<div class="by-{kind}">{plot(f"reward-{index}-{kind}", alt, WIDE, xlabel, draw)}</div>'


def signal_charts(run: Run) -> str:
    """Return small charts that show whether updates are healthy; those without data are left out."""
    charts = []
    for index, signal in enumerate(SIGNALS):
        shown = [key for key in signal.keys if any(row.get(key) is not None for row in run.metrics)]
        if not shown:
            continue
        series = [values(run.metrics, key) for key in shown]
        draw = partial(_draw_series, x=values(run.metrics, "iteration"), series=series)
        alt = f"{signal.title} against iterations: " + "; ".join(_in_words(line) for line in series) + "."
        svg = plot(f"signal-{index}", alt, SMALL, "iteration", draw)
        names = [(i, "line", key.rpartition("/")[2].replace("_", " ")) for i, key in enumerate(shown)]
        legend = _legend(names) if len(names) > 1 else ""
        charts.append(_small(signal.title, signal.meaning, legend + svg))
    return _small_charts(charts)


def evaluation_charts(evaluations: Sequence[Evaluation]) -> str:
    """Return charts of the held-out figures against iterations, for labels with at least three figures."""
    charts = []
    for index, label in enumerate(evaluation_labels(evaluations)):
        points = [(e.iteration, e.mean(label)) for e in evaluations if label in e.figures]
        known = [(float(iteration), mean) for iteration, mean in points if mean is not None]
        if len(known) < 3:
            continue
        x, y = [point[0] for point in known], [point[1] for point in known]
        alt = f"Held-out {label} against iterations: {_in_words(y)}."
        svg = plot(f"heldout-{index}", alt, SMALL, "iteration", partial(_draw_series, x=x, series=[y]))
        charts.append(_small(label, "", svg))
    return _small_charts(charts)


def depth_charts(run: Run) -> str:
    """Return charts by depth of the mean size of an advantage and the share of the loss, averaged over iterations."""
    charts = []
    for prefix, title, meaning in (
        ("advantage/abs_mean/depth_", "Mean size of an advantage", "Mean |advantage| of the edges into a depth."),
        ("loss_share/depth_", "Share of the loss", "What the trained edges into a depth contribute to the loss."),
    ):
        means = {int(key.removeprefix(prefix)): mean(run.metrics, key) for key in keys(run.metrics, prefix, r"\d+")}
        heights = {depth: height for depth, height in sorted(means.items()) if height is not None}
        if heights:
            largest = max(heights, key=lambda depth: heights[depth])
            alt = f"{title} by depth; largest at depth {largest} with {number(heights[largest])}."
            svg = plot(f"depth-{prefix[:4]}", alt, SMALL, "depth of the edge's end", partial(_bars, heights=heights))
            charts.append(_small(title, f"{meaning} Mean over {len(run.metrics)} iterations.", svg))
    return _small_charts(charts)


def evaluation_labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return every label that was evaluated, in the order of first appearance."""
    return list(dict.fromkeys(label for evaluation in evaluations for label in evaluation.figures))


def keys(rows: Sequence[LogRow], prefix: str = "", suffix: str = ".*") -> list[str]:
    """Return the names of figures that have a value in some row, in the order of first appearance."""
    pattern = re.compile(re.escape(prefix) + suffix, re.DOTALL)
    found = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    return [key for key in found if pattern.fullmatch(key)]


def values(rows: Sequence[LogRow], key: str) -> list[float]:
    """Return a figure over the iterations; NaN where it is missing, so that lines have gaps there."""
    return [math.nan if (value := row.get(key)) is None else value for row in rows]


def mean(rows: Sequence[LogRow], key: str) -> float | None:
    """Return the mean of a figure over the iterations that have it; None if none has."""
    present = [value for row in rows if (value := row.get(key)) is not None]
    return sum(present) / len(present) if present else None


def reward_labels(rows: Sequence[LogRow]) -> list[str]:
    """The labels of the training rewards, in the order of first appearance."""
    return [match[1] for key in keys(rows) if (match := re.fullmatch(r"reward/(.+)/mean", key))]


def smoothed(series: Sequence[float]) -> Sequence[float]:
    """The running mean that a curve of many iterations is shown as; of few, the series itself."""
    return running_mean(series, _window(len(series))) if len(series) >= SMOOTHED_FROM else series


def running_mean(series: Sequence[float], window: int) -> list[float]:
    """Return the mean over a window centred on each index, without missing values."""
    half = window // 2
    means = []
    for index in range(len(series)):
        near = [value for value in series[max(index - half, 0) : index + half + 1] if not math.isnan(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _window(count: int) -> int:
    return 2 * max(count // 40, 1) + 1


def _draw_series(axes: Axes, x: Sequence[float], series: Sequence[Sequence[float]]) -> None:
    for colour, line in enumerate(series):
        lines(axes, x, line, colour)
    whole_ticks(axes)


def _bars(axes: Axes, heights: dict[int, float]) -> None:
    axes.bar(list(heights), list(heights.values()), color=SERIES[0], width=0.72)
    whole_ticks(axes)


def _in_words(series: Sequence[float]) -> str:
    """Describe a curve in words."""
    known = [value for value in series if not math.isnan(value)]
    if not known:
        return "no values"
    return f"from {number(known[0])} to {number(known[-1])}, between {number(min(known))} and {number(max(known))}"


def _small(title: str, meaning: str, content: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(meaning)}</span></figcaption>{content}</figure>"


def _small_charts(charts: Sequence[str]) -> str:
    return f'<div class="charts small">{"".join(charts)}</div>' if charts else ""


def _legend(names: Sequence[tuple[int, str, str]]) -> str:
    """Return a legend of entries (series, kind of mark, text)."""
    entries = (f'<span><i class="mark {kind} c{colour}"></i>{escape(text)}</span>' for colour, kind, text in names)
    return f'<p class="legend">{"".join(entries)}</p>'
