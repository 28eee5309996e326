"""The tables of full_size.py, in Markdown: what was measured, and what arithmetic predicts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from full_size_work import cost_of
from operations import Operations, count_operations
from sampling import Timed

from branchtree.plugins import ModelAdapter
from branchtree.recipe.schema import Recipe

MARKS = {"dancegrpo": 698, "branchgrpo": 493, "width_pruned": 314, "depth_pruned": 314, "mix": 148}
"""Seconds an iteration in the paper (arXiv 2509.06040), FLUX.1-dev on H200s; it gives one figure for pruning."""
STRIDE = 5
"""Iterations between two whose rows are counted for a mean: every window of the recipes moves by multiples of it."""


@dataclass(frozen=True)
class Result:
    """One method's iteration on one model."""

    model: str
    method: str
    rollout: Timed
    update: Timed
    decode: Timed | None
    peak_bytes: int
    planned_bytes: int
    operations: Operations
    matrix_rate: float
    device: str

    @property
    def phases(self) -> list[Timed]:
        """The phases that were timed."""
        return [phase for phase in (self.rollout, self.update, self.decode) if phase is not None]

    @property
    def seconds(self) -> float:
        """The seconds of the whole iteration, by what was timed."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def seconds_run(self) -> float:
        """The seconds of the share of it that was run."""
        return sum(phase.seconds_run for phase in self.phases)

    @property
    def rollout_rate(self) -> float:
        """Operations a second in the rollout."""
        return self.rollout.rows * self.operations.forward / self.rollout.seconds

    @property
    def update_rate(self) -> float:
        """Operations a second in the gradient pass, optimiser included."""
        return self.update.rows * self.operations.trained / self.update.seconds


HEADINGS = (
    "model",
    "method",
    "rows, rollout",
    "rows, gradient pass",
    "rollout, s",
    "gradient pass, s",
    "decoding, s",
    "iteration, s",
    "seconds run",
    "TFLOP/s, rollout",
    "TFLOP/s, gradient pass",
    "of the matrix rate",
    "peak GiB",
    "planned GiB",
)


def cells(result: Result) -> list[str]:
    """A row of the table of results."""
    tera, gib = 1e12, 2**30
    return [
        result.model,
        result.method,
        str(result.rollout.rows),
        str(result.update.rows),
        f"{result.rollout.seconds:.1f}",
        f"{result.update.seconds:.1f}",
        f"{result.decode.seconds:.1f}" if result.decode else "-",
        f"{result.seconds:.1f}",
        f"{result.seconds_run:.1f}",
        f"{result.rollout_rate / tera:.4g}",
        f"{result.update_rate / tera:.4g}",
        f"{result.update_rate / result.matrix_rate:.2f}",
        f"{result.peak_bytes / gib:.1f}",
        f"{result.planned_bytes / gib:.1f}",
    ]


def print_results(results: Sequence[Result], heading: bool) -> None:
    """Rows of the table of results, below its headings where they are the first."""
    if heading:
        first = results[0]
        print(f"\n{first.device}, torch {torch.__version__}, matrix rate {first.matrix_rate / 1e12:.4g} TFLOP/s\n")
        print_row(HEADINGS, rule=True)
    for result in results:
        print_row(cells(result))


def print_row(texts: Sequence[str], rule: bool = False) -> None:
    """One row in Markdown, and the rule below headings."""
    print("| " + " | ".join(texts) + " |", flush=True)
    if rule:
        print("|" + " --- |" * len(texts))


def to_json(results: Sequence[Result], arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, and how they were asked for."""
    asked = {name: str(value) if name == "output" else value for name, value in vars(arguments).items()}
    rows = [{**asdict(result), "seconds": result.seconds, "seconds_run": result.seconds_run} for result in results]
    return {"torch": torch.__version__, "arguments": asked, "results": rows}


@dataclass(frozen=True)
class MeanRows:
    """Rows of an iteration, mean over a recipe's run: sliding windows make some iterations dearer than others."""

    rollout: float
    gradient: float

    @staticmethod
    def of(recipe: Recipe) -> MeanRows:
        """Counted at every fifth iteration."""
        costs = [cost_of(recipe, iteration) for iteration in range(0, recipe.run.iterations, STRIDE)]
        return MeanRows(
            sum(cost.rollout_rows for cost in costs) / len(costs),
            sum(cost.gradient_rows for cost in costs) / len(costs),
        )

    def flops(self, operations: Operations) -> float:
        """Operations of the denoiser in a mean iteration."""
        return self.rollout * operations.forward + self.gradient * operations.trained


def print_predictions(
    name: str, recipes: Mapping[str, Recipe], model: ModelAdapter, arguments: argparse.Namespace
) -> None:
    """What each method would take at some rates; nothing is run."""
    first = next(iter(recipes.values()))
    assert first.lora is not None
    operations = count_operations(model, first.lora.rank)
    print(
        f"\n{name}: a forward of one prediction {operations.forward / 1e12:.4g} TFLOP, trained "
        f"{operations.trained / 1e12:.4g} TFLOP, which is {operations.forwards_per_trained_row:.2f} forwards\n"
    )
    seconds = [f"s at {rate:g} TFLOP/s" for rate in arguments.predict]
    print_row(["method", "rows, rollout", "rows, gradient pass", "PFLOP", *seconds, "paper, s"], rule=True)
    for method, recipe in recipes.items():
        rows = MeanRows.of(recipe)
        flops = rows.flops(operations)
        predicted = [f"{flops / (rate * 1e12):.0f}" for rate in arguments.predict]
        mark = MARKS.get(method) if name == "flux" else None
        work = [f"{rows.rollout:.0f}", f"{rows.gradient:.0f}", f"{flops / 1e15:.1f}"]
        print_row([method, *work, *predicted, str(mark or "-")])
