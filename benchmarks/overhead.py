"""Iteration time over the bare denoiser's time for the same rows, measured in one run.

The cost that no trainer can avoid is the denoiser's own: one forward for each rolled-out row, one forward and backward
for each trained row. This runs a recipe's iterations and, after each, sends the same numbers of rows in the same
batches through the same denoiser with nothing around it.

    python benchmarks/overhead.py quickstart --iterations 20
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from branchtree import plan
from branchtree.protocols import Callback, VelocityFunction
from branchtree.recipe import load_recipe
from branchtree.rollout import chunks
from branchtree.training.policy import velocity_function
from branchtree.training.rundir import TIMING, RunDirectory
from branchtree.training.session import Session, make_accelerator, open_session, read_inputs
from branchtree.training.trainer import Trainer
from branchtree.tree import grow


class BareDenoiser(Callback):
    """After each iteration, times the denoiser alone on the rows that the iteration used."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._noise = self._rows()
        self.seconds: list[float] = []

    def _rows(self) -> torch.Tensor:
        """Distinct latents, as many as the largest batch needs."""
        session, batch = self._session, self._session.recipe.batch
        largest = batch.update_rows or batch.prompts * plan(session.recipe).per_prompt.nodes
        source = torch.Generator().manual_seed(0)
        one = session.inputs.model.initial_noise(source)
        return torch.randn(largest, *one.shape, generator=source).to(session.device)

    def on_iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Repeat the iteration's forwards and backwards on the same batch sizes."""
        session, batch = self._session, self._session.recipe.batch
        ids = session.order.batch(iteration, batch.prompts)
        topology = grow([session.inputs.schedule.plan(iteration, prompt_id) for prompt_id in ids])
        conditions = [session.inputs.conditions[session.order.index(prompt_id)] for prompt_id in ids]
        conditioning = session.cache.get(conditions, session.device)
        velocity = velocity_function(session.inputs.model, conditioning, session.accelerator.autocast)
        start = time.perf_counter()
        with torch.no_grad():
            for depth in topology.depths[:-1]:
                for rows in chunks(len(topology.evaluated(depth)), batch.rollout_rows):
                    self._forward(velocity, len(rows))
        for rows in chunks(int(metrics["rows/gradient"]), batch.update_rows):
            self._forward(velocity, len(rows)).square().mean().backward()
        self.seconds.append(time.perf_counter() - start)
        session.updater.optimizer.zero_grad()

    def _forward(self, velocity: VelocityFunction, rows: int) -> torch.Tensor:
        session = self._session
        latents = self._noise[:rows].contiguous()
        prompt = torch.arange(rows, device=session.device) % session.recipe.batch.prompts
        return velocity(latents, torch.linspace(0.1, 1, rows, device=session.device), prompt)


def main() -> None:
    """Print the ratio's median over iterations, and where the rest of the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--iterations", type=int, default=20)
    arguments = parser.parse_args()
    overrides = {"run.iterations": arguments.iterations, "run.checkpoint_every": 10**6, "run.sample_every": 10**6}
    recipe = load_recipe(arguments.recipe, {**overrides, "run.tree_every": 10**6, "evaluation": None})
    with tempfile.TemporaryDirectory() as folder:
        output = RunDirectory(Path(folder) / "run")
        inputs = read_inputs(recipe)
        output.claim(resume=False)
        session = open_session(inputs, output, make_accelerator(recipe, output))
        bare = BareDenoiser(session)
        Trainer(session, [bare]).run(resume=False)
        timing = output.rows(TIMING)
    print_table(arguments.recipe, timing, bare.seconds)


def print_table(name: str, timing: list[dict[str, float]], bare: list[float]) -> None:
    """Medians over iterations; the first is left out, as it warms up."""
    ratios = [row["total"] / alone for row, alone in zip(timing, bare, strict=True)][1:]
    print(f"{name}: {len(ratios)} iterations after one to warm up, {torch.get_num_threads()} threads")
    print(f"{'iteration / bare denoiser':28s} median {statistics.median(ratios):.3f}  min {min(ratios):.3f}")
    print(f"{'bare denoiser':28s} {statistics.median(bare[1:]):.3f} s")
    for phase in timing[0]:
        if phase != "iteration":
            print(f"{phase:28s} {statistics.median([row[phase] for row in timing[1:]]):.3f} s")


if __name__ == "__main__":
    main()
