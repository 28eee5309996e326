"""Iteration time over the bare denoiser's time for the same rows, measured in one run.

The cost that no trainer can avoid is the denoiser's own: one forward for each rolled-out row, one forward and backward
for each trained row. This runs a recipe's iterations and, after each, sends the same numbers of rows in the same
batches through the same denoiser with nothing around it.

    python benchmarks/overhead.py quickstart --iterations 20
    python benchmarks/overhead.py quickstart --iterations 20 --expensive

With ``--expensive`` the decoder is wider and two vision towers, HPS-v2's and PickScore's with small random weights,
score the leaves. The ratio is given to the denoiser alone, and to denoiser, decoder and rewards in turn: what lies
between the two is hidden.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from branchtree import plan
from branchtree.cli.arguments import parse_overrides
from branchtree.core.rollout import VelocityFunction, chunks
from branchtree.core.tree import Topology
from branchtree.plugins import Callback, Condition
from branchtree.recipe import load_recipe
from branchtree.run.directory import TIMING, RunDirectory
from branchtree.training.inputs import read_inputs
from branchtree.training.iteration import plan_batch
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.session import Session
from branchtree.training.trainer import Trainer

EXPENSIVE_REWARDS = [{"reward": name, "path": "random:small"} for name in ("hps", "pickscore")]
EXPENSIVE_WIDTH = 3  # of the decoder, times the bundled one's


class BareDenoiser(Callback):
    """After each iteration, times the denoiser alone on the rows that the iteration used, then decoder and rewards."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._noise = self._rows()
        self.denoiser: list[float] = []  # seconds
        self.scoring: list[float] = []  # of decoding and scoring as many leaves

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
        planned = plan_batch(session, iteration)
        topology, conditions = planned.topology, planned.conditions
        velocity = session.policy.under(conditions).training(None)
        start = time.perf_counter()
        with torch.no_grad():
            for depth in topology.depths[:-1]:
                for rows in chunks(len(topology.evaluated(depth)), batch.rollout_rows):
                    self._forward(velocity, len(rows))
        for rows in chunks(int(metrics["rows/gradient"]), batch.update_rows):
            self._forward(velocity, len(rows)).square().mean().backward()
        self.denoiser.append(time.perf_counter() - start)
        session.updater.optimizer.zero_grad()
        start = time.perf_counter()
        self._decode_and_score(topology, conditions)
        self.scoring.append(time.perf_counter() - start)

    def _decode_and_score(self, topology: Topology, conditions: Sequence[Condition]) -> None:
        """As many leaves as the iteration had, by every reward in turn."""
        session = self._session
        asked = [conditions[prompt] for prompt in topology.leaf_root.tolist()]
        for rows in chunks(len(asked), session.recipe.batch.decode_rows):
            media = session.inputs.model.decode(self._noise[: len(rows)])
            for reward in session.inputs.rewards:
                with torch.no_grad():
                    reward.adapter.score(media, asked[rows.start : rows.stop])

    def _forward(self, velocity: VelocityFunction, rows: int) -> torch.Tensor:
        session = self._session
        latents = self._noise[:rows].contiguous()
        prompt = torch.arange(rows, device=session.device) % session.recipe.batch.prompts
        return velocity(latents, torch.linspace(0.1, 1, rows, device=session.device), prompt)


def main(words: list[str] | None = None) -> None:
    """Print the ratio's median over iterations, and where the rest of the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--expensive", action="store_true", help="a wider decoder and two vision towers as rewards")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    arguments = parser.parse_intermixed_args(words)
    seldom = {f"run.{name}_every": 10**6 for name in ("checkpoint", "sample", "tree")}
    overrides: dict[str, Any] = {"run.iterations": arguments.iterations, **seldom, "evaluation": None}
    overrides |= {"rewards": EXPENSIVE_REWARDS} if arguments.expensive else {}
    recipe = load_recipe(arguments.recipe, overrides | parse_overrides(arguments.overrides))
    with tempfile.TemporaryDirectory() as folder:
        output = RunDirectory(Path(folder) / "run")
        inputs = read_inputs(recipe)
        output.claim(resume=False)
        session = open_session(inputs, output, make_accelerator(recipe))
        if arguments.expensive:
            widen_decoder(session)
        bare = BareDenoiser(session)
        Trainer(session, [bare]).run(resume=False)
        timing = output.rows(TIMING)
    print_table(arguments.recipe, timing, bare)


def widen_decoder(session: Session) -> None:
    """Give the model a decoder of the same layout with more channels and random weights."""
    pipeline = cast(Any, session.inputs.model).pipeline
    config = dict(pipeline.vae.config)
    config["block_out_channels"] = [EXPENSIVE_WIDTH * width for width in config["block_out_channels"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = type(pipeline.vae).from_config(config)
    pipeline.register_modules(vae=wide.eval().requires_grad_(False))


def print_table(name: str, timing: list[dict[str, float]], bare: BareDenoiser) -> None:
    """Medians over iterations; the first is left out, as it warms up."""
    in_turn = [sum(pair) for pair in zip(bare.denoiser, bare.scoring, strict=True)]
    print(f"{name}: {len(in_turn) - 1} iterations after one to warm up, {torch.get_num_threads()} threads")
    for title, alone in (("iteration / bare denoiser", bare.denoiser), ("iteration / all in turn", in_turn)):
        ratios = [row["total"] / seconds for row, seconds in zip(timing, alone, strict=True)][1:]
        print(f"{title:28s} median {statistics.median(ratios):.3f}  min {min(ratios):.3f}")
    print(f"{'bare denoiser':28s} {statistics.median(bare.denoiser[1:]):.3f} s")
    print(f"{'decoder and rewards':28s} {statistics.median(bare.scoring[1:]):.3f} s")
    for phase in timing[0]:
        if phase != "iteration":
            print(f"{phase:28s} {statistics.median([row[phase] for row in timing[1:]]):.3f} s")


if __name__ == "__main__":
    main()
