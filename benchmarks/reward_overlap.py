"""How much of a reward's time is hidden behind an iteration's other work, measured in one run.

A stand-in reward takes half as long as a rollout, in one of two ways: it computes on this machine, or it waits, as for
a server. The same iterations are done with overlap and without, in turn.

    hidden = (seconds without overlap - seconds with overlap) / the reward's own seconds

Prompts are finished one at a time, so that the others' rollout hides the first ones' scoring, and the first ones'
gradient pass that of the last.

    python benchmarks/reward_overlap.py quickstart --iterations 8
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from branchtree.core.scores import Scores
from branchtree.plugins import Condition, Media
from branchtree.plugins.scores import NamedReward
from branchtree.recipe import load_recipe
from branchtree.run.directory import RunDirectory
from branchtree.training.inputs import read_inputs
from branchtree.training.iteration import iterate
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.session import Session


@dataclass
class StandIn:
    """A reward that spends a set time on each sample."""

    spend: Callable[[float], None]
    seconds_per_sample: float = 0.0
    modalities: frozenset[str] = frozenset({"image", "video"})

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Brightness, after the set time."""
        self.spend(self.seconds_per_sample * len(media))
        return Scores(media.pixels.flatten(1).mean(dim=1).cpu(), torch.ones(len(media), dtype=torch.bool))


def compute(seconds: float) -> None:
    """Convolve for so much of this thread's own processor time."""
    network = torch.nn.Conv2d(32, 32, 3, padding=1)
    pixels = torch.rand(1, 32, 96, 96)
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        network(pixels)


WAYS: dict[str, Callable[[float], None]] = {"computing": compute, "waiting": time.sleep}


def timed(session: Session, iteration: int) -> tuple[float, dict[str, float]]:
    """The seconds that an iteration takes, and those of its phases."""
    start = time.perf_counter()
    watch = iterate(session, iteration).timing
    return time.perf_counter() - start, watch.report()


def main() -> None:
    """Print the hidden share for both ways of spending time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=8)
    arguments = parser.parse_args()
    overrides = {"batch.prompts": arguments.prompts, "batch.rollout_prompts": 1, "evaluation": None, "run.threads": 1}
    recipe = load_recipe(arguments.recipe, overrides)
    print(
        f"{arguments.recipe}: {arguments.prompts} prompts, finished one at a time; {arguments.iterations} pairs of runs"
    )
    print(f"{'reward':10s}  rollout  reward  without   with  hidden")
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        session = open_session(read_inputs(recipe), directory, make_accelerator(recipe))
        for way, spend in WAYS.items():
            print_row(way, session, StandIn(spend), arguments.iterations)


def print_row(way: str, session: Session, reward: StandIn, iterations: int) -> None:
    """Set the reward to half a rollout, then measure; medians over pairs of runs."""
    alone = with_reward(session, reward, overlap=False)
    timed(alone, 0)
    samples = sum(alone.inputs.schedule.plan(0, place).leaves for place in range(session.recipe.batch.prompts))
    rollout = statistics.median(timed(alone, iteration)[1]["rollout"] for iteration in range(3))
    reward.seconds_per_sample = rollout / 2 / samples
    together = with_reward(session, reward, overlap=True)
    rows = []
    for iteration in range(iterations):
        without, phases = timed(alone, iteration)
        rows.append((phases["rollout"], phases["reward_work"], without, timed(together, iteration)[0]))
    hidden = statistics.median((without - overlapped) / work for _, work, without, overlapped in rows)
    figures = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"{way:10s}  {figures[0]:6.2f}s {figures[1]:6.2f}s {figures[2]:7.2f}s {figures[3]:5.2f}s {hidden:6.0%}")


def with_reward(session: Session, reward: StandIn, overlap: bool) -> Session:
    """The session under the stand-in alone."""
    scoring = session.recipe.scoring.model_copy(update={"overlap": overlap})
    recipe = session.recipe.model_copy(update={"scoring": scoring})
    inputs = replace(session.inputs, recipe=recipe, rewards=[NamedReward("stand-in", 1.0, reward)])
    return replace(session, inputs=inputs)


if __name__ == "__main__":
    main()
