"""The commands ``watch`` and ``runs``: a run as it trains, and all runs of a folder, in a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from branchtree.cli.console import make_console, visible
from branchtree.errors import OutputError

if TYPE_CHECKING:
    from branchtree.report.read import Run

CHART_ROWS = 6
"""The height of a reward's curve, in lines."""
RECENT = 10
"""Iterations over which seconds are averaged."""
MOST_LEAVES, MOST_ALARMS = 16, 3
BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " __..--=#"


def watch(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks at its files.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
) -> None:
    """Show a run while it trains: curves, rates, its last tree and alarms. It ends with the run, or with Ctrl-C."""
    console = make_console()
    if not once and console.is_terminal:
        with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, screen=True) as live:
            while (found := _read(run)) is None or found.state == "running":
                live.update(_screen(found, console), refresh=True)
                time.sleep(every)
    console.print(_screen(_read(run), console))


def _read(run: Path) -> Run | None:
    """Return a run; None if one has begun there and no iteration of it is done. Raises OutputError."""
    from branchtree.report.read import read_run
    from branchtree.run.directory import METRICS
    from branchtree.run.lock import writer

    if writer(run) and not (run / METRICS).is_file():
        return None
    return read_run(run)


def _screen(run: Run | None, console: Console) -> RenderableType:
    """Return what is shown of a run, the most urgent first: a terminal cuts off what does not fit."""
    if run is None:
        return Text("The run has begun; its first iteration is not done yet.")
    ascii_only = console.options.ascii_only
    charts = _rewards(run, console.width, ASCII_BLOCKS if ascii_only else BLOCKS)
    return Group(*_head(run), *_alarms(run), *charts, *_held_out(run), *_tree(run, ascii_only))


def _head(run: Run) -> list[RenderableType]:
    """Return the run's name, state, progress and rates."""
    planned = run.planned or run.done
    name = Text(visible(str(run.setting("name") or run.path.name)), style="bold")
    name.append(f"  {run.state}, iteration {run.done} of {planned}", style="not bold")
    return [name, Text(_rates(run, planned)), ProgressBar(total=max(planned, 1), completed=run.done)]


def _rates(run: Run, planned: int) -> str:
    """Return seconds an iteration, where they go, rows, and the time that is left."""
    from branchtree.report.markup import duration

    recent = [row for row in run.timing[-RECENT:] if row.get("total")]
    if not recent:
        return "no iteration timed yet"
    means = {
        phase: sum(row.get(phase) or 0.0 for row in recent) / len(recent) for phase in ("total", "rollout", "update")
    }
    parts = [f"{means['total']:.3g} s an iteration (rollout {means['rollout']:.3g}, update {means['update']:.3g})"]
    rows = run.metrics[-1].get("rows/equivalent") if run.metrics else None
    if rows:
        parts.append(f"{rows / means['total']:,.0f} row equivalents a second")
    if run.state == "running" and planned > run.done:
        parts.append(f"about {duration((planned - run.done) * means['total'])} left")
    return "; ".join(parts)


def _alarms(run: Run) -> list[RenderableType]:
    return [
        Text(f"Alarm after iteration {alarm.iteration}: {visible(alarm.message)}", style="red")
        for alarm in run.alarms[-MOST_ALARMS:]
    ]


def _rewards(run: Run, width: int, blocks: str) -> list[RenderableType]:
    """Return a curve of each training reward."""
    from branchtree.report.curves import reward_labels, smoothed, values

    charts: list[RenderableType] = []
    for label in reward_labels(run.metrics):
        means = values(run.metrics, f"reward/{label}/mean")
        charts += [Text(f"\nTraining reward {visible(label)}", style="bold"), *_chart(smoothed(means), width, blocks)]
    return charts


def _chart(series: Sequence[float], width: int, blocks: str) -> list[Text]:
    """Return a curve as lines of block characters, the newest value at the right, with its ends at the left."""
    known = [value for value in series if not math.isnan(value)]
    if not known:
        return [Text("no values")]
    low, high = min(known), max(known)
    margin = max(len(f"{end:.4g}") for end in (low, high)) + 1
    columns = _columns(series, max(width - margin, 1))
    steps = CHART_ROWS * (len(blocks) - 1)
    heights = [
        0 if math.isnan(value) else 1 + round((value - low) / (high - low or 1) * (steps - 1)) for value in columns
    ]
    lines = []
    for row in reversed(range(CHART_ROWS)):
        end = f"{high:.4g}" if row == CHART_ROWS - 1 else f"{low:.4g}" if row == 0 else ""
        filled = (min(max(height - row * (len(blocks) - 1), 0), len(blocks) - 1) for height in heights)
        lines.append(Text(f"{end:>{margin - 1}} " + "".join(blocks[level] for level in filled)))
    return lines


def _columns(series: Sequence[float], width: int) -> list[float]:
    """Return a series as at most ``width`` values: means of as many neighbours, or each value as often as fits."""
    if len(series) <= width:
        return [value for value in series for _ in range(width // len(series))]
    bounds = [index * len(series) // width for index in range(width + 1)]
    groups = ([value for value in series[a:b] if not math.isnan(value)] for a, b in pairwise(bounds))
    return [sum(group) / len(group) if group else math.nan for group in groups]


def _held_out(run: Run) -> list[RenderableType]:
    """Return the held-out figures at the first evaluation, the last, and the best of them."""
    from branchtree.report.curves import evaluation_labels

    if not run.evaluations:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    table = Table(
        "Held out", f"iteration {first.iteration}", f"iteration {last.iteration}", box=None, header_style="bold"
    )
    for label in evaluation_labels([first, last]):
        means = [entry.mean(label) for entry in (first, last)]
        table.add_row(visible(label), *("-" if mean is None else f"{mean:.4f}" for mean in means))
    return [Text(), table]


def _tree(run: Run, ascii_only: bool) -> list[RenderableType]:
    """Return the last recorded tree, drawn from the left, with the reward of each leaf."""
    from branchtree.cli.display import ASCII_LINES
    from branchtree.report.tree_layout import lay_out_tree

    if not run.trees:
        return []
    tree = run.trees[-1]
    children = lay_out_tree(tree).children
    rewards = {leaf.node: leaf.rewards for leaf in tree.leaves}

    def lines(node: int) -> list[str]:
        """Return the lines below a node; each split is one column, whatever lies between."""
        below = children[node]
        while len(below) == 1:
            node, below = below[0].id, children[below[0].id]
        if not below:
            shown = "  ".join(
                f"{label} {value:.4g}" for label, value in rewards.get(node, {}).items() if value is not None
            )
            return [f"o {visible(shown)}"]
        drawn = []
        for index, child in enumerate(below):
            first, last = index == 0, index == len(below) - 1
            head = "┬━━" if first else "└━━" if last else "├━━"
            block = lines(child.id)
            drawn += [head + block[0], *(("   " if last else "│  ") + line for line in block[1:])]
        return drawn

    drawn = lines(tree.nodes[0].id)
    if len(drawn) > MOST_LEAVES:
        drawn = [*drawn[:MOST_LEAVES], f"... and {len(drawn) - MOST_LEAVES} more leaves"]
    text = "\n".join(drawn)
    title = Text(f"\nTree of iteration {tree.iteration}: {visible(tree.prompt)}", style="bold", no_wrap=True)
    return [title, Text(text.translate(ASCII_LINES) if ascii_only else text, no_wrap=True)]


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder that holds runs, at any depth.")] = Path("runs"),
) -> None:
    """List the runs of a folder with their state, iterations, held-out figures and alarms; the newest first."""
    from branchtree.report.find import find_runs

    found = find_runs(folder)
    if not found:
        raise OutputError(f"{folder}: holds no run whose first iteration is done; give the folder that runs lie in")
    table = Table("Run", "State", "Iterations", "Held out", "Alarms", box=None, header_style="bold", padding=(0, 1))
    for run in found:
        iterations = f"{run.done} of {run.planned}" if run.planned is not None else str(run.done)
        alarms = str(len(run.alarms)) if run.alarms else "-"
        name = visible(str(run.path.relative_to(folder)))
        table.add_row(name, run.state, iterations, "\n".join(_before_after(run)), alarms)
    make_console().print(table)


def _before_after(run: Run) -> Iterable[str]:
    from branchtree.report.curves import evaluation_labels

    for label in evaluation_labels(run.evaluations):
        means = [entry.figures[label].mean for entry in run.evaluations if label in entry.figures]
        ends = [means[0], means[-1]] if len(means) > 1 else means
        yield f"{visible(label)} {' to '.join('-' if mean is None else f'{mean:.4f}' for mean in ends)}"
