"""Held-out figures of comparisons against iteration and against processor time, as one picture.

    python benchmarks/plot_comparison.py runs/splits runs/branches --figure log_prob --output docs/images/scaling.svg

Each directory is one that ``branchtree compare`` wrote, with ``evaluation.every`` set; it becomes a row of two charts.
Lines are means over seeds, bands one standard deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")


@dataclass(frozen=True)
class Curve:
    """One row of a comparison at each evaluation."""

    name: str
    iterations: list[int]
    seconds: list[float]  # of the processor, mean over seeds
    mean: list[float]
    std: list[float]


def read_curves(comparison: Path, figure: str) -> list[Curve]:
    """The rows of a comparison, in its order."""
    asked = json.loads((comparison / "compare.json").read_text(encoding="utf-8"))["asked"]
    return [_curve(name, comparison / row["folder"], asked["seeds"], figure) for name, row in asked["rows"].items()]


def _curve(name: str, folder: Path, seeds: Sequence[int], figure: str) -> Curve:
    runs = [_points(folder / f"seed_{seed}", figure) for seed in seeds]
    values = [[value for _, _, value in moment] for moment in zip(*runs, strict=True)]
    return Curve(
        name=name,
        iterations=[iteration for iteration, _, _ in runs[0]],
        seconds=[statistics.mean(seconds for _, seconds, _ in moment) for moment in zip(*runs, strict=True)],
        mean=[statistics.mean(value) for value in values],
        std=[statistics.stdev(value) if len(value) > 1 else 0.0 for value in values],
    )


def _points(run: Path, figure: str) -> list[tuple[int, float, float]]:
    """Iterations done, processor seconds until then, and the figure, at each evaluation of one run."""
    spent = {int(row["iteration"]): float(row["seconds"]) for row in _rows(run / "cpu.jsonl")}
    return [
        (done, sum(spent[iteration] for iteration in range(done)), float(row["figures"][figure]["mean"]))
        for row in _rows(run / "evaluation.jsonl")
        for done in [int(row["iteration"])]
    ]


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def draw(comparisons: Sequence[Path], figure: str, output: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.2 * len(comparisons)), layout="constrained")
    charts = canvas.subplots(len(comparisons), 2, sharey="row", squeeze=False)
    for (left, right), comparison in zip(charts, comparisons, strict=True):
        for curve in read_curves(comparison, figure):
            low = [mean - std for mean, std in zip(curve.mean, curve.std, strict=True)]
            high = [mean + std for mean, std in zip(curve.mean, curve.std, strict=True)]
            for chart, x in ((left, curve.iterations), (right, curve.seconds)):
                (line,) = chart.plot(x, curve.mean, marker="o", markersize=3, label=curve.name)
                chart.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        left.set(xlabel="iteration", ylabel=f"held-out {figure}")
        right.set(xlabel="processor seconds")
        left.legend(frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(output, metadata={"Date": None})


def main(words: Sequence[str] | None = None) -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", type=Path)
    parser.add_argument("--figure", default="log_prob")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(words)
    draw(arguments.comparisons, arguments.figure, arguments.output)


if __name__ == "__main__":
    main()
