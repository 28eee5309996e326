"""What the commands print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from branchtree.planning import RunPlan, draw_tree
from branchtree.protocols import Callback
from branchtree.training.evaluation import Figure

GIB = 2**30


class ProgressDisplay(Callback):
    """A progress bar with the time left, the reward, and held-out figures as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._task is not None:
            self._progress.stop()

    def on_start(self, output: Path, iteration: int, iterations: int) -> None:
        """Show where the run is written and start the bar."""
        self._console.print(f"Run directory: {output}")
        self._task = self._progress.add_task("training", total=iterations, completed=iteration, figures="")
        self._progress.start()

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        rewards = [f"{name.split('/')[1]} {value:.3f}" for name, value in metrics.items() if _is_mean(name)]
        if self._task is not None:
            self._progress.update(self._task, completed=iteration + 1, figures="  ".join(rewards))

    def on_evaluation(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Print held-out figures."""
        shown = "  ".join(f"{label} {value:.4f}" for label, value in figures.items())
        self._console.print(f"Held out after {iteration} iterations: {shown}")

    def on_end(self, output: Path) -> None:
        """Leave the bar full."""
        self._stop()


def _is_mean(name: str) -> bool:
    return name.startswith("reward/") and name.endswith("/mean")


def figures_table(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> Table:
    """Held-out figures before and after training."""
    table = Table("Held out", "Before", "After", "Change", "Samples", header_style="bold")
    for label, start in before.items():
        end = after[label]
        change = "-" if start.mean is None or end.mean is None else f"{end.mean - start.mean:+.4f}"
        table.add_row(label, _shown(start.mean), _shown(end.mean), change, str(end.samples))
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_plan(console: Console, plan: RunPlan) -> None:
    """A plan: the tree, the counts, the memory."""
    recipe = plan.recipe
    console.print(f"{recipe.name}: {recipe.description}", markup=False)
    console.print("\nTree of the first prompt (heavy: stochastic steps, light: deterministic)")
    console.print(draw_tree(plan.tree), markup=False, soft_wrap=True)
    console.print(_counts(plan))
    console.print(_memory(plan))
    console.print(f"Model sizes: {plan.footprint.source}.", markup=False)
    console.print(
        f"Denoiser work: {plan.flops / 1e15:.3g} PFLOP an iteration, {plan.flops / 4e14:.3g} s at 400 TFLOP/s.",
    )


def _counts(plan: RunPlan) -> Table:
    table = Table("", "First prompt", f"Iteration ({plan.recipe.batch.prompts} prompts)", header_style="bold")
    one, all_ = plan.per_prompt, plan.iteration
    factor = plan.rows_per_prediction
    rows = {
        "nodes": (one.nodes, all_.nodes),
        "edges": (one.edges, all_.edges),
        "leaves": (one.leaves, all_.leaves),
        "rollout rows": (factor * one.rollout_rows, plan.rollout_rows),
        "gradient rows": (factor * one.gradient_rows, plan.gradient_rows),
        "trained edges": (one.trained_edges, all_.trained_edges),
    }
    for name, (first, every) in rows.items():
        table.add_row(name, str(first), str(every))
    table.add_row("nodes / leaves", f"{one.nodes_per_leaf:.2f}", f"{all_.nodes_per_leaf:.2f}")
    return table


def _memory(plan: RunPlan) -> Table:
    memory = plan.memory
    table = Table("Memory estimate, one process", "GiB", header_style="bold")
    place = "host" if memory.states_on_host else "device"
    for name, size in (
        ("denoiser weights", memory.weights),
        ("gradients and optimiser", memory.optimizer),
        ("activations of a gradient batch", memory.activations),
        (f"tree states, on the {place}", memory.states),
        ("encoders and decoder, on the device while they work", memory.frozen),
        ("device, peak", memory.device),
        ("host", memory.host),
    ):
        table.add_row(name, f"{size / GIB:.3g}")
    return table
