"""What the commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from branchtree.planning.fitting import Fit, in_words
from branchtree.planning.gpus import GIB, USABLE
from branchtree.planning.memory import frozen_weights
from branchtree.planning.plan import RunPlan, draw_tree
from branchtree.plugins.base import Callback

if TYPE_CHECKING:
    from branchtree.training.evaluation import Figure

ASCII_LINES = str.maketrans("━─│├└┬", "=-|+++")
"""Lines of a drawn tree for a terminal whose encoding has ASCII only."""
RATE = 4e14
"""Operations a second that the estimate of time assumes."""
UNCOUNTED = ("kernels' workspaces", "activations of encoders and reward models")
"""Needs that no plan counts."""


class ProgressDisplay(Callback):
    """A progress bar with the time left, the reward, and held-out figures as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
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
        self._console.print(f"Run directory: {output}", soft_wrap=True)
        self._task = self._progress.add_task("training", total=iterations, completed=iteration, figures="")
        self._progress.start()

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        rewards = [
            f"{name.removeprefix('reward/').removesuffix('/mean')} {value:.3f}"
            for name, value in metrics.items()
            if _is_mean(name)
        ]
        if self._task is not None:
            self._progress.update(self._task, completed=iteration + 1, figures="  ".join(rewards))

    def on_evaluation(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Print held-out figures."""
        shown = "  ".join(f"{label} {value:.4f}" for label, value in figures.items())
        self._console.print(f"Held out after {iteration} iterations: {shown}", soft_wrap=True)

    def on_end(self, output: Path) -> None:
        """Leave the bar full."""
        self._stop()


def _is_mean(name: str) -> bool:
    return name.startswith("reward/") and name.endswith("/mean")


def figures_table(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> Table:
    """Return a table of held-out figures before and after training; a label without a figure before has no change."""
    table = Table("Held out", "Before", "After", "Change", "Samples", header_style="bold")
    for label, end in after.items():
        start = before[label].mean if label in before else None
        change = "-" if start is None or end.mean is None else f"{end.mean - start:+.4f}"
        table.add_row(label, _shown(start), _shown(end.mean), change, str(end.samples))
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def print_plan(console: Console, plan: RunPlan) -> None:
    """Print a plan: the tree, the counts, the memory, the GPUs that it fits on, and the time."""
    recipe = plan.recipe
    ascii_only = console.options.ascii_only
    heavy, light, lines = ("=", "-", ASCII_LINES) if ascii_only else ("heavy", "light", {})
    console.print(f"{recipe.name}: {recipe.description}", soft_wrap=True)
    console.print(f"\nTree of the first prompt ({heavy}: stochastic steps, {light}: deterministic)")
    console.print(draw_tree(plan.tree).translate(lines), soft_wrap=True)
    console.print(_counts(plan))
    console.print(_memory(plan))
    for line in (
        *_budget(plan),
        *_shared(plan),
        *_noise(plan),
        *_quantized(plan),
        *_rewards(plan),
        _not_counted(plan),
        *fits_lines(plan.fits),
        f"Model sizes: {plan.footprint.source}.",
        _time(plan),
    ):
        console.print(line, soft_wrap=True)
    for line in [*_assumptions(plan), *([plan.noise_warning] if plan.noise_warning else [])]:
        console.print(f"Warning: {line}", style="yellow", soft_wrap=True)


def planned_seconds(plan: RunPlan) -> tuple[float, float, float]:
    """Return the seconds of an iteration's rollout, gradient pass and decoding on a GPU of the assumed rate."""
    return plan.rollout_flops / RATE, plan.gradient_flops / RATE, _decoding_seconds(plan)


def _time(plan: RunPlan) -> str:
    rollout, gradient, decoding = planned_seconds(plan)
    whole = rollout + gradient + decoding
    phases = [f"rollout {_figure(rollout)} s", f"gradient pass {_figure(gradient)} s"]
    if decoding:
        phases = [", ".join(phases), f"decoding {_figure(decoding)} s ({decoding / whole:.1%})"]
    slower = ", half of it for a decoder in float32" if _decodes_in_float32(plan) else ""
    return (
        f"Denoiser work: {_figure(plan.flops / 1e15)} PFLOP an iteration. Estimated time: {_figure(whole)} s, of which "
        f"{' and '.join(phases)}, assuming {RATE / 1e12:.0f} TFLOP/s (40% of an H100's bf16 peak{slower})."
    )


def _decoding_seconds(plan: RunPlan) -> float:
    """Return the seconds of decoding; the rate is halved where the decoder runs in float32 (TF32) and not in bf16."""
    return plan.decoder_flops / (RATE / 2 if _decodes_in_float32(plan) else RATE)


def _decodes_in_float32(plan: RunPlan) -> bool:
    decoder = plan.footprint.decoder
    return bool(decoder and decoder.number_bytes == 4 and plan.recipe.run.precision == "bf16")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _counts(plan: RunPlan) -> Table:
    table = Table("", "First prompt", f"Iteration ({plan.recipe.batch.prompts} prompts)", header_style="bold")
    one, all_ = plan.per_prompt, plan.iteration
    factor = plan.rows_per_prediction
    rows = {"nodes": (one.nodes, all_.nodes), "edges": (one.edges, all_.edges), "leaves": (one.leaves, all_.leaves)}
    note = ""
    if factor > 1:
        rows["rollout predictions"] = (one.rollout_rows, all_.rollout_rows)
        rows["gradient predictions"] = (one.gradient_rows, all_.gradient_rows)
        note = f" (guidance, x{factor})"
    rows[f"rollout rows{note}"] = (factor * one.rollout_rows, factor * all_.rollout_rows)
    if all_.probes:
        rows["probes"] = (one.probes, all_.probes)
        rows[f"probe rows{note}"] = (factor * one.probe_rows, factor * all_.probe_rows)
    rows[f"gradient rows{note}"] = (factor * one.gradient_rows, plan.gradient_rows)
    rows["trained edges"] = (one.trained_edges, all_.trained_edges)
    for name, (first, every) in rows.items():
        table.add_row(name, str(first), str(every))
    table.add_row("nodes / leaves", f"{one.nodes_per_leaf:.2f}", f"{all_.nodes_per_leaf:.2f}")
    return table


def _budget(plan: RunPlan) -> list[str]:
    """Return a line about the rows of iterations that differ; none where splits do not adapt."""
    budget = plan.budget
    if budget is None:
        return []
    return [
        f"Splits adapt: an iteration's rollouts are at most {budget.most} predictions, {budget.mean:.0f} on average; "
        f"a split has up to {budget.most_children} children. The tables are for the first iteration."
    ]


def _shared(plan: RunPlan) -> list[str]:
    """Return a line about the work of each process that shares a tree; none where one process has it all."""
    if len(plan.shares) == 1:
        return []
    leaves, rows = max(share.leaves for share in plan.shares), [share.rollout_rows for share in plan.shares]
    return [
        f"Shared by {len(rows)} processes, the first prompt's tree is at most {leaves} leaves and {max(rows)} rollout "
        f"predictions for each, {sum(rows)} in all, since each computes the nodes above its leaves. The tables are for "
        "one process with whole trees."
    ]


def _noise(plan: RunPlan) -> list[str]:
    """Return a line about the noise of a leaf."""
    if plan.noise is None:
        return [
            "Noise injected into a leaf: not known before a run; the transition states no scale of its noise, or the "
            "time grid is that of the loaded model (sampler.grid)."
        ]
    total, differing = _figure(plan.noise.total), _figure(plan.noise.differing)
    part = "" if total == differing else f", of which {differing} from the first split on, where leaves differ"
    return [
        f"Noise injected into a leaf: {total}{part} (the root of the sum of std^2 over its stochastic steps, mean over "
        "the run's trees)."
    ]


def _memory(plan: RunPlan) -> Table:
    memory = plan.memory
    table = Table("Memory estimate, one process", "GiB", header_style="bold")
    for name, size in memory.needs.items():
        table.add_row(name, _figure(size / GIB))
    if memory.states_on_host and memory.states:
        table.add_row("tree states, on the host", _figure(memory.states / GIB))
    table.add_row("device, peak", _figure(memory.device / GIB))
    table.add_row("host", _figure(memory.host / GIB))
    return table


def _quantized(plan: RunPlan) -> list[str]:
    """Return a line on the weights that are kept in fewer bits."""
    kind, layers, whole = plan.recipe.model.quantize, plan.footprint.quantizable, plan.footprint.denoiser_parameters
    if kind is None or layers is None:
        return []
    plain = plan.recipe.model_copy(update={"model": plan.recipe.model.model_copy(update={"quantize": None})})
    before, after = (frozen_weights(recipe, plan.footprint) / GIB for recipe in (plain, plan.recipe))
    return [
        f"Quantised to {kind}: {_figure(100 * layers.parameters / whole)}% of the denoiser's weights, which with their "
        f"scales and the other weights are {_figure(after)} GiB in place of {_figure(before)}."
    ]


def _rewards(plan: RunPlan) -> list[str]:
    """Return a line with the memory of each reward model."""
    named = [
        f"{size.label} {_figure(size.footprint.weights / GIB)} GiB"
        + (" (leaves the device between its calls)" if size.footprint.offloads else "")
        for size in plan.rewards.all
        if size.footprint and size.footprint.weights
    ]
    return [f"Reward models: {', '.join(named)}."] if named else []


def _not_counted(plan: RunPlan) -> str:
    unknown = dict.fromkeys(size.label for size in plan.rewards.all if size.footprint is None)
    missing = [f"reward models whose size is not known ({', '.join(unknown)})"] if unknown else []
    if plan.footprint.decoder is None:
        missing.append("the decoder's own activations")
    if not plan.footprint.forward_numbers_per_row:
        missing.append("activations of the rollout (batch.rollout_rows)")
    if not plan.footprint.conditioning_numbers:
        missing.append("encoded prompts")
    return f"Not counted: {', '.join([*missing, *UNCOUNTED])}."


def _assumptions(plan: RunPlan) -> list[str]:
    """Return a warning for each assumption on which the figures depend."""
    lines = [f"the model's sizes are {plan.footprint.source}"] if plan.footprint.assumed else []
    lines += [
        f"the size of the reward '{size.label}' is assumed to be that of {size.footprint.assumed}"
        for size in plan.rewards.all
        if size.footprint and size.footprint.assumed
    ]
    return [f"{line}; the figures above may be wrong." for line in lines]


def fits_lines(fits: Sequence[Fit]) -> list[str]:
    """Return lines that say on which GPUs a plan fits, on which after changes, and on which not at all."""
    groups: dict[str | None, list[str]] = {"": [], None: []}
    for fit in fits:
        words = None if fit.changes is None else in_words(fit.changes)
        groups.setdefault(words, []).append(fit.gpu.name)
    suffice, lacking = groups.pop(""), groups.pop(None)
    none = "Fits on none of the GPUs known here." + (" What to change:" if groups else "")
    lines = [f"Fits on: {', '.join(suffice)}." if suffice else none]
    lines += [f"With {words}: {', '.join(names)}." for words, names in reversed(groups.items())]
    if lacking:
        setting = "states, batches, gradient checkpointing, precision, LoRA and quantisation"
        lines.append(f"Too small, however {setting} are set: {', '.join(lacking)}.")
    return [*lines, f"({USABLE:.0%} of a GPU's memory is taken to be usable; leave room for what is not counted.)"]
