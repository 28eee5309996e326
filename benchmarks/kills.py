"""Trains a recipe once undisturbed and once under SIGKILL again and again, and compares the two byte for byte.

The kills are spread evenly over the iterations of the run, each aimed at one phase: a process that starts, iterations,
the half-written folder of a checkpoint, and in the end that of ``final/``. The moment within the phase is random
(seeded). After each kill the run is resumed. In the end metrics.jsonl, evaluation.jsonl and the trained weights must be
those of the run that was never killed.

    python benchmarks/kills.py quickstart --kills 30
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from branchtree import train
from branchtree.recipe.source import parse_value

Phase = Literal["startup", "training", "checkpoint", "final"]
PHASES: tuple[Phase, ...] = ("startup", "training", "checkpoint", "final")
RHYTHM: tuple[Phase, ...] = ("training", "checkpoint", "startup", "startup", "training", "checkpoint")
"""What kills are aimed at in turn; of two startups in a row the second finds no progress since the first."""
FINAL_SHARE = 10
"""Every how many kills one is aimed at the writing of ``final/``, and one at least."""
COMPARED = ("metrics.jsonl", "evaluation.jsonl")
POLL = 0.0005
"""Seconds between two looks: a checkpoint of the small model is written in a few milliseconds."""
PATIENCE = 900.0
"""Seconds without a kill, after which something is wrong."""


@dataclass(frozen=True)
class Target:
    """Where a kill shall come."""

    aim: Phase
    iterations: int  # lines of metrics, at least; a startup is struck whatever there is


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: what it was aimed at, what it hit, and when."""

    aim: Phase
    hit: Phase
    seconds: float  # after the process was started
    iterations: int  # lines of metrics then


@dataclass(frozen=True)
class Job:
    """A run to be trained."""

    recipe: str
    overrides: Mapping[str, Any]
    output: Path

    def start(self) -> BaseProcess:
        """A process that begins the run, or resumes what there is of it."""
        process = _context().Process(target=_train, args=(self, (self.output / "recipe.yaml").is_file()))
        process.start()
        return process

    @property
    def iterations(self) -> int:
        """Lines of metrics."""
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def phase(self, since: int) -> Phase:
        """What the process does that was started at ``since`` (time.time_ns), or did when it was killed.

        Times of writing tell its work from what an earlier process left. The recipe is written at every start, once
        the logs are rewound.
        """
        if not _written(self.output / "recipe.yaml", since):
            return "startup"
        if any(_written(folder, since) for folder in self.output.glob(".final.*.partial")):
            return "final"
        folders = (self.output / "checkpoints").glob(".iteration_*.partial")
        return "checkpoint" if any(_written(folder, since) for folder in folders) else "training"


def _context() -> ForkServerContext:
    """Processes that find the large libraries imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["branchtree.training.trainer", "diffusers", "transformers", "accelerate"])
    return context


def _train(job: Job, resume: bool) -> None:
    """In a process of its own, which ends with an exit code above 0 if the run fails."""
    train(job.recipe, job.overrides, output=job.output, resume=resume)


def _written(path: Path, since: int) -> bool:
    try:
        return path.stat().st_mtime_ns >= since
    except FileNotFoundError:
        return False


def watch(job: Job) -> dict[Phase, float]:
    """Train to the end; the mean seconds of each phase, of ``training`` those of an iteration.

    Raises RuntimeError if the run fails.
    """
    warm_up = _context().Process(target=int)  # the imports before the first process are no part of its startup
    warm_up.start()
    warm_up.join()
    seconds, times, before = dict.fromkeys(PHASES, 0.0), Counter[Phase](), None
    since, looked = time.time_ns(), time.perf_counter()
    process = job.start()
    while process.is_alive():
        phase, now = job.phase(since), time.perf_counter()
        seconds[phase] += now - looked
        times[phase] += phase != before
        before, looked = phase, now
        time.sleep(POLL)
    _require_success(job, process)
    times["training"] = job.iterations
    return {phase: spent / max(times[phase], 1) for phase, spent in seconds.items()}


def finish(job: Job) -> None:
    """Train to the end. Raises RuntimeError if the run fails."""
    process = job.start()
    process.join()
    _require_success(job, process)


def _require_success(job: Job, process: BaseProcess) -> None:
    if process.exitcode != 0:
        raise RuntimeError(f"{job.output}: the run ended with exit code {process.exitcode}")


def spread(kills: int, iterations: int, draw: random.Random) -> list[Target]:
    """Targets in even parts of the run, at a random place in each."""
    last = max(1, kills // FINAL_SHARE)
    places = [int(iterations * (part + draw.random()) / (kills - last)) for part in range(kills - last)]
    spread_out = [Target(RHYTHM[number % len(RHYTHM)], place) for number, place in enumerate(places)]
    return [*spread_out, *[Target("final", iterations)] * last]


def kill_again_and_again(
    job: Job, targets: Sequence[Target], seconds: Mapping[Phase, float], draw: random.Random
) -> list[Kill]:
    """Start or resume the run and kill it, once for each target; ``seconds`` are those that a phase takes.

    A process that is done before its kill is started again: even a run that has ended writes ``final/`` again. Raises
    RuntimeError if the run fails.
    """
    done: list[Kill] = []
    while len(done) < len(targets):
        target = targets[len(done)]
        since, start = time.time_ns(), time.perf_counter()
        process = job.start()
        if _reached(job, process, target, since):
            time.sleep(draw.random() * seconds[target.aim])
        kill_at = time.perf_counter() - start
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            done.append(Kill(target.aim, job.phase(since), kill_at, job.iterations))
        else:
            _require_success(job, process)
    return done


def _reached(job: Job, process: BaseProcess, target: Target, since: int) -> bool:
    """Wait until the process is where it shall be killed; False if it ends before."""
    start = time.perf_counter()
    while process.is_alive():
        if job.phase(since) == target.aim and (target.aim == "startup" or job.iterations >= target.iterations):
            return True
        if time.perf_counter() - start > PATIENCE:
            process.kill()
            raise RuntimeError(f"{job.output}: {target} was not reached in {PATIENCE:.0f} s")
        time.sleep(POLL)
    return False


def compare(first: Path, second: Path) -> dict[str, bool]:
    """Whether each file of figures, and each of the trained weights, has the same bytes in both runs."""
    weights = {path.relative_to(run) for run in (first, second) for path in (run / "final").rglob("*.safetensors")}
    names = [*COMPARED, *sorted(str(path) for path in weights)]
    return {name: _digest(first / name) == _digest(second / name) for name in names if (first / name).exists()}


def _digest(path: Path) -> str | None:
    """Digest a file's bytes; a safetensors header as data, for that library writes its metadata in any order."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        start = 8 + int.from_bytes(content[:8], "little")
        content = json.dumps(json.loads(content[8:start]), sort_keys=True).encode() + content[start:]
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Print one table, and end with exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to override")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=2, help="iterations, so that the run gets on")
    arguments = parser.parse_args()
    given = {key: parse_value(value) for key, value in (word.split("=", 1) for word in arguments.overrides)}
    overrides = {"run.checkpoint_every": arguments.checkpoint_every, **given}
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Job(arguments.recipe, overrides, Path(folder) / "whole")
        killed = Job(arguments.recipe, overrides, Path(folder) / "killed")
        seconds = watch(whole)
        print(f"{arguments.recipe}, undisturbed: {whole.iterations} iterations; mean seconds of a phase:")
        print(", ".join(f"{phase} {spent:.3f}" for phase, spent in seconds.items()), flush=True)
        targets = spread(arguments.kills, whole.iterations, draw)
        kills = kill_again_and_again(killed, targets, seconds, draw)
        finish(killed)
        same = compare(whole.output, killed.output)
        print_table(kills, same)
        if not all(same.values()):
            raise SystemExit(1)


def print_table(kills: Sequence[Kill], same: Mapping[str, bool]) -> None:
    """What was hit, and what came out."""
    aimed, hit = Counter(kill.aim for kill in kills), Counter(kill.hit for kill in kills)
    print(f"{len(kills)} kills:")
    print(f"{'':28s} {'aimed at':>10s} {'hit':>10s}")
    for phase in PHASES:
        print(f"{phase:28s} {aimed[phase]:10d} {hit[phase]:10d}")
    print(f"{'folder half written':28s} {hit['checkpoint'] + hit['final']}")
    print(f"{'seconds after a start':28s} median {statistics.median(kill.seconds for kill in kills):.1f}")
    print(f"{'iterations logged at a kill':28s} {' '.join(str(kill.iterations) for kill in kills)}")
    for file, equal in same.items():
        print(f"{file:60s} {'the same bytes' if equal else 'DIFFERS'}")


if __name__ == "__main__":
    main()
