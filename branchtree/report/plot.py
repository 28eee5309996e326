"""Plots as inline SVG that takes its colours from the page, so that it follows light and dark mode.

Matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables. Only numbers are drawn;
names that come from a run are in the page's own text, never in a plot.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from branchtree.report.markup import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#0000f1", "#0000f2", "#0000f3"
SERIES = tuple(f"#0000a{index}" for index in range(4))
SMALL, WIDE = (4.8, 2.75), (6.7, 3.5)  # inches of 72 units

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {c: f"--c{i}" for i, c in enumerate(SERIES)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.use_mathtext": False,
    "axes.xmargin": 0.02,
    "axes.ymargin": 0.08,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "text.color": INK,
}


def plot(name: str, alt: str, size: tuple[float, float], xlabel: str, draw: Callable[[Axes], None]) -> str:
    """Return one set of axes as an ``svg`` element; ``name`` makes its ids unique on the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    written = io.BytesIO()
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(figsize=size)
        left, bottom, top = 0.62 / size[0], 0.52 / size[1], 1 - 0.2 / size[1]
        axes = figure.add_axes((left, bottom, 0.97 - left, top - bottom))
        axes.set_xlabel(xlabel)
        draw(axes)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue().decode("utf-8"), name, alt)


def whole_ticks(axes: Axes) -> None:
    """Label the x axis with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def large_ticks(axes: Axes) -> None:
    """Label the x axis in thousands or millions."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def lines(axes: Axes, x: Sequence[float], y: Sequence[float], colour: int, faint: bool = False) -> None:
    """Draw a line with gaps where y is NaN; if there are few points, they are marked."""
    axes.plot(
        x,
        y,
        color=SERIES[colour],
        alpha=0.35 if faint else 1.0,
        linewidth=0.9 if faint else 1.6,
        marker="o" if len(x) <= 30 and not faint else "",
        markersize=3,
    )


def _inline(svg: str, name: str, alt: str) -> str:
    """Return an SVG for use inside a document: without prolog, metadata and global styles, and with unique ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', svg)
    box = view.group(1) if view else "0 0 100 100"
    svg = f'<svg class="plot" viewBox="{box}" role="img" aria-label="{escape(alt)}">' + svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()
