"""What the parts of an iteration cost: batches, pruning, processes, memory and checkpoints, a table for each.

    python benchmarks/costs.py batch        rows a second of a rollout against rows per forward
    python benchmarks/costs.py pruning      rows and time of the gradient pass under each pruning rule
    python benchmarks/costs.py processes    the same iterations on one process and on two
    python benchmarks/costs.py memory       what an iteration adds at its fullest moment
    python benchmarks/costs.py checkpoint   writing and loading one, against an iteration
    python benchmarks/costs.py all

Seconds are processor time on a CPU, so that other programs do not count, and the clock's on a GPU; where the clock is
meant on a CPU too, the table says so. What family sharing saves is in iteration_cost.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size_work import cost_of, sampled_rollout
from operations import seconds_of
from sessions import QUIET, Prompts, credited, grown, opened, under, updated

from branchtree.cli.arguments import parse_overrides
from branchtree.planning.memory import estimate_memory
from branchtree.recipe import load_recipe
from branchtree.run.checkpoint import newest_whole
from branchtree.run.directory import METRICS, TIMING, RunDirectory
from branchtree.training.keeper import CheckpointKeeper
from branchtree.training.session import Session
from branchtree.training.trained import load_checkpoint, restore_weights

PRUNING = {"none": "branchgrpo", "parent_top1": "width_pruned", "extreme": "extreme_pruned", "depth": "depth_pruned"}
COUNTS = (1, 2)  # of processes
# With --cpu instead of the file accelerate would start a single process, whatever their number.
TWO_PROCESSES = Path(__file__).parents[1] / "recipes" / "accelerate" / "cpu.yaml"
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(TWO_PROCESSES), "--main_process_port", "0"]
CHECKPOINTED = {"run.gradient_checkpointing": True}


def table(*headings: str) -> None:
    """The head of a table in Markdown."""
    row(*headings)
    print("|" + " --- |" * len(headings))


def row(*values: object) -> None:
    """A line of it."""
    print("| " + " | ".join(str(value) for value in values) + " |", flush=True)


def one_iteration(session: Session, iteration: int) -> None:
    """Rollout, decoding, reward, credit and update."""
    prompts = Prompts.of(session, iteration)
    tree, scores = grown(session, iteration, prompts)
    updated(session, iteration, tree, credited(session, iteration, tree, scores), prompts)


def batch(recipe: str, overrides: dict[str, Any], rounds: int) -> dict[int, float]:
    """Rows a second by the largest batch of a rollout."""
    base = load_recipe(recipe, {**QUIET, **overrides})
    leaves = cost_of(base, 0).leaves
    sizes = [2**power for power in range(leaves.bit_length()) if 2**power <= leaves]
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    with opened(base) as session:
        prompts = Prompts.of(session, 0)
        for place in range(rounds + 1):
            for size in sizes:
                limited = base.model_copy(update={"batch": base.batch.model_copy(update={"rollout_rows": size})})
                work = under(session, limited)
                seconds, (_, tree) = seconds_of(partial(sampled_rollout, work, 0, prompts, 1.0), session.device)
                if place:
                    rates[size].append(tree.topology.rollout_rows / seconds)
    medians = {size: statistics.median(values) for size, values in rates.items()}
    table("rows per forward, at most", "rows a second", "of the best")
    for size, rate in medians.items():
        row(size, f"{rate:.4g}", f"{rate / max(medians.values()):.2f}")
    return medians


def pruning(recipe: str, overrides: dict[str, Any], rounds: int) -> dict[str, tuple[int, float]]:
    """Trained rows and seconds of the gradient pass by pruning rule."""
    recipes = {kind: load_recipe(f"{recipe}+{method}", {**QUIET, **overrides}) for kind, method in PRUNING.items()}
    rows: dict[str, int] = {}
    seconds: dict[str, list[float]] = {kind: [] for kind in PRUNING}
    with opened(recipes["none"]) as session:
        sessions = {kind: under(session, loaded) for kind, loaded in recipes.items()}
        for iteration in range(rounds + 1):
            for kind, work in sessions.items():
                prompts = Prompts.of(work, iteration)
                tree, scores = grown(work, iteration, prompts)
                families = credited(work, iteration, tree, scores)
                pass_ = partial(updated, work, iteration, tree, families, prompts)
                spent, _ = seconds_of(pass_, session.device)
                rows[kind] = len(families)
                if iteration:
                    seconds[kind].append(spent)
    found = {kind: (rows[kind], statistics.median(values)) for kind, values in seconds.items()}
    table("pruning", "trained rows", "update, s", "saved", "predicted")
    for kind, (count, spent) in found.items():
        saved, predicted = 1 - spent / found["none"][1], 1 - count / found["none"][0]
        row(f"`{kind}`", count, f"{spent:.3f}", f"{saved:.1%}", f"{predicted:.1%}")
    return found


def processes(recipe: str, overrides: dict[str, Any], rounds: int) -> dict[int, dict[str, float]]:
    """One process and two, for the same prompts an iteration, each run started anew."""
    words = {**QUIET, "run.threads": 1, **overrides, "run.iterations": rounds + 1}
    found: dict[int, dict[str, float]] = {}
    table("processes", "rows for each", "iteration, s on the clock", "rollout, s", "update, s", "times as fast")
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "run"
            launcher = [*LAUNCH, "--num_processes", str(count)] if count > 1 else []
            command = [sys.executable, *launcher, "-m", "branchtree", "train", recipe, "--output", str(output)]
            changes = [f"{key}={json.dumps(value)}" for key, value in words.items()]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, "--no-report", *changes], check=True, env=environment, capture_output=True)
            timing, metrics = RunDirectory(output).rows(TIMING)[1:], RunDirectory(output).rows(METRICS)[1:]
        figures = {name: statistics.median(line[name] for line in timing) for name in ("total", "rollout", "update")}
        rows = statistics.median(line["rows/rollout"] + line["rows/gradient"] for line in metrics)
        found[count] = {**figures, "rows": rows / count}
        gain = found[COUNTS[0]]["total"] / figures["total"]
        row(count, f"{rows / count:.0f}", *(f"{seconds:.2f}" for seconds in figures.values()), f"{gain:.2f}")
    return found


VARIANTS: Mapping[str, dict[str, Any]] = {
    "64 rows in an update batch": {"batch.update_rows": 64},
    "256 rows": {"batch.update_rows": 256},
    "256 rows, checkpointing": {"batch.update_rows": 256, **CHECKPOINTED},
    "256 rows, states on the host": {"batch.update_rows": 256, "batch.states": "host"},
}


def memory(recipe: str, overrides: dict[str, Any], rounds: int) -> dict[str, tuple[float, float]]:
    """What an iteration adds to memory, each variant in a process of its own, and what the planner says it adds."""
    found: dict[str, tuple[float, float]] = {}
    table("variant", "added at the peak, MiB", "planned, MiB")
    for name, changes in VARIANTS.items():
        words = [f"{key}={json.dumps(value)}" for key, value in {**overrides, **changes}.items()]
        command = [sys.executable, __file__, "peak", "--recipe", recipe, *words]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        added, planned = (float(part) / 2**20 for part in told.splitlines()[-1].split())
        found[name] = (added, planned)
        row(name, f"{added:.0f}", f"{planned:.0f}")
    return found


def peak(recipe: str, overrides: dict[str, Any], rounds: int) -> None:
    """Print the bytes that one iteration adds, measured and planned; of a process, once."""
    loaded = load_recipe(recipe, {**QUIET, **overrides})
    with opened(loaded) as session:
        gpu = session.device.type == "cuda"
        Prompts.of(session, 0)
        before = torch.cuda.memory_allocated() if gpu else _resident_peak()
        one_iteration(session, 0)
        after = torch.cuda.max_memory_allocated() if gpu else _resident_peak()
        estimate = estimate_memory(loaded, session.inputs.model.footprint(), cost_of(loaded, 0))
    states = 0 if gpu and estimate.states_on_host else estimate.states
    print(after - before, estimate.optimizer + states + max(estimate.activations, estimate.forward))


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def checkpoint(recipe: str, overrides: dict[str, Any], rounds: int) -> dict[str, float]:
    """Writing and loading a checkpoint against an iteration, on the clock; medians."""
    loaded = load_recipe(recipe, {**QUIET, **overrides})
    seconds: dict[str, list[float]] = {"iteration": [], "write": [], "load": []}
    with opened(loaded) as session:
        keeper = CheckpointKeeper(session)
        for iteration in range(rounds + 1):
            seconds["iteration"].append(_clocked(partial(one_iteration, session, iteration)))
            seconds["write"].append(_clocked(partial(keeper.save, iteration + 1)))
            seconds["load"].append(_clocked(partial(_take_up, session)))
        newest = session.output.checkpoints / f"iteration_{rounds + 1:06d}"
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    figures = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    table("", "seconds on the clock", "of an iteration")
    for name, spent in figures.items():
        row(name, f"{spent:.4f}", f"{spent / figures['iteration']:.1%}")
    print(f"\n{size:,} bytes")
    return {**figures, "bytes": size}


def _take_up(session: Session) -> None:
    """Check the newest checkpoint and put all of it back, as --resume does."""
    path = newest_whole(session.output.checkpoints)
    if path is not None:
        restore_weights(path, session.inputs.model, None)
        load_checkpoint(path, session.trained, session.recipe)


def _clocked(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


TABLES: dict[str, Callable[[str, dict[str, Any], int], Any]] = {
    "batch": batch,
    "pruning": pruning,
    "processes": processes,
    "memory": memory,
    "checkpoint": checkpoint,
}


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Print one table or all; returns their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "all", "peak"])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    arguments = parser.parse_intermixed_args(words)
    chosen = TABLES if arguments.table == "all" else {arguments.table: {**TABLES, "peak": peak}[arguments.table]}
    figures: dict[str, Any] = {}
    for name, print_table in chosen.items():
        if name != "peak":
            print(f"\n{name}: {arguments.recipe} {' '.join(arguments.overrides)}\n")
        figures[name] = print_table(arguments.recipe, parse_overrides(arguments.overrides), arguments.rounds)
    return figures


if __name__ == "__main__":
    main()
