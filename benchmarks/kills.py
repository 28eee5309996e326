"""Trains a recipe once undisturbed and once under SIGKILL again and again, and compares the two byte for byte.

Kills come at random moments (seeded); a share of them is aimed at the writing of a checkpoint, which shows by its
folder without a name, and another at the first moments of a resumption. After each kill the run is resumed. In the end
metrics.jsonl, evaluation.jsonl and the trained weights must be those of the run that was never killed.

    python benchmarks/kills.py quickstart --kills 30
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from branchtree import train
from branchtree.recipe.source import parse_value

Aim = Literal["anywhere", "checkpoint", "resume"]
AIMS: tuple[Aim, ...] = ("anywhere", "checkpoint", "resume")
COMPARED = ("metrics.jsonl", "evaluation.jsonl")
POLL = 0.0005
"""Seconds between two looks: a checkpoint of the small model is written in a few milliseconds."""
PATIENCE = 900.0
"""Seconds without a kill, after which something is wrong."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: what it was aimed at, when it came, and what it hit."""

    aim: Aim
    seconds: float  # after the process was started
    iterations: int  # lines of metrics then
    writing: bool  # a checkpoint or ``final/`` was half written


@dataclass(frozen=True)
class Job:
    """A run to be trained."""

    recipe: str
    overrides: Mapping[str, Any]
    output: Path

    def start(self) -> BaseProcess:
        """A process that begins the run, or resumes what there is of it."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["branchtree.training.trainer", "diffusers", "transformers", "accelerate"])
        resume = (self.output / "recipe.yaml").is_file()
        process = context.Process(target=_train, args=(self, resume))
        process.start()
        return process

    @property
    def iterations(self) -> int:
        """Lines of metrics."""
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    @property
    def writing(self) -> bool:
        """Whether a folder is being written under its temporary name."""
        return any(any(folder.glob(".*.partial")) for folder in (self.output / "checkpoints", self.output))


def _train(job: Job, resume: bool) -> None:
    """In a process of its own, which ends with an exit code above 0 if the run fails."""
    train(job.recipe, job.overrides, output=job.output, resume=resume)


def finish(job: Job) -> float:
    """Train to the end; the seconds it took. Raises RuntimeError if the run fails."""
    start = time.perf_counter()
    process = job.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{job.output}: the run ended with exit code {process.exitcode}")
    return time.perf_counter() - start


def kill_again_and_again(job: Job, kills: int, seed: int, longest: float) -> list[Kill]:
    """Start or resume the run and kill it, so many times; a moment is drawn from the first ``longest`` seconds.

    There are fewer if the run ends before. Raises RuntimeError if it fails.
    """
    draw, done = random.Random(seed), list[Kill]()
    while len(done) < kills:
        aim = AIMS[len(done) % len(AIMS)]
        process, start = job.start(), time.perf_counter()
        moment = draw.uniform(0, longest / 10 if aim == "resume" else longest)
        struck = _wait(job, process, aim, start, moment)
        kill_at = time.perf_counter() - start
        process.kill()
        process.join()
        if not struck and process.exitcode != 0:
            raise RuntimeError(f"{job.output}: after {len(done)} kills the run ended with code {process.exitcode}")
        if not struck:
            break
        done.append(Kill(aim, kill_at, job.iterations, job.writing))
    return done


def _wait(job: Job, process: BaseProcess, aim: Aim, start: float, moment: float) -> bool:
    """Wait for the moment of a kill; False if the process ends before. A checkpoint is waited for from then on."""
    while time.perf_counter() - start < PATIENCE:
        if time.perf_counter() - start >= moment and (aim != "checkpoint" or job.writing):
            return process.is_alive()
        if not process.is_alive():
            return False
        time.sleep(POLL)
    process.kill()
    raise RuntimeError(f"{job.output}: nothing came to an end in {PATIENCE:.0f} s")


def compare(first: Path, second: Path) -> dict[str, bool]:
    """Whether each file of figures, and each of the trained weights, has the same bytes in both runs."""
    weights = {path.relative_to(run) for run in (first, second) for path in (run / "final").rglob("*.safetensors")}
    names = [*COMPARED, *sorted(str(path) for path in weights)]
    return {name: _digest(first / name) == _digest(second / name) for name in names if (first / name).exists()}


def _digest(path: Path) -> str | None:
    """Of a file's bytes; of a safetensors file's header as data, for that library writes its metadata in any order."""
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
    with tempfile.TemporaryDirectory() as folder:
        whole = Job(arguments.recipe, overrides, Path(folder) / "whole")
        killed = Job(arguments.recipe, overrides, Path(folder) / "killed")
        seconds = finish(whole)
        longest = 2 * seconds / (arguments.kills + 1) + 2
        kills = kill_again_and_again(killed, arguments.kills, arguments.seed, longest)
        finish(killed)
        print_table(arguments.recipe, seconds, kills, compare(whole.output, killed.output), whole.iterations)
        if not all(compare(whole.output, killed.output).values()):
            raise SystemExit(1)


def print_table(name: str, seconds: float, kills: Sequence[Kill], same: Mapping[str, bool], iterations: int) -> None:
    """What was hit, and what came out."""
    aims = Counter(kill.aim for kill in kills)
    hit = sum(kill.writing for kill in kills)
    print(f"{name}: {iterations} iterations, {seconds:.0f} s undisturbed, {len(kills)} kills")
    print(f"{'aimed at':28s} {json.dumps(aims)}")
    print(f"{'while a folder was written':28s} {hit}")
    print(f"{'seconds after a start':28s} median {statistics.median(kill.seconds for kill in kills):.1f}")
    print(f"{'iterations logged at a kill':28s} {' '.join(str(kill.iterations) for kill in kills)}")
    for file, equal in same.items():
        print(f"{file:60s} {'the same bytes' if equal else 'DIFFERS'}")


if __name__ == "__main__":
    main()
