"""How much of a one-iteration gradient is signal, at a fixed policy, for each method at about equal rows.

Independent gradients g_1 ... g_n of one policy differ by their prompts and noises alone. With s the mean of g_i . g_j
over i != j, which is |E g|^2 without bias, and m the mean of |g_i|^2:

    cosine   mean over i < j of the cosine of g_i and g_j
    SNR      s / (m - s), signal over noise, and the same per 1,000 rows: it grows in proportion to the prompts
    useful   (r . mean g)^2 / (|r|^2 m) per 1,000 rows, r the mean gradient of the reference method: a gradient that
             points another way, however surely, has little of it

Errors are those of the jackknife over the gradients. A trained row counts as three. This is the cheap test of whether a
method gives a better gradient; learning curves (branchtree compare) are the dear one.

    python benchmarks/gradient_snr.py quickstart --gradients 64 --rows 3000
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree import load_recipe, plan
from branchtree.core.cost import GRADIENT_COST
from branchtree.run.directory import METRICS, RunDirectory
from branchtree.training.inputs import read_inputs
from branchtree.training.loading import make_accelerator, open_session
from branchtree.training.trainer import Trainer

EDGES = ("dancegrpo", "branchgrpo", "width_pruned", "depth_pruned", "mix", "mixgrpo", "tempflow", "single")
LEAVES = ("single+nft", "single+awm", "single+vgrpo", "single+crd")
METHODS = (*EDGES, *LEAVES)
FIXED: dict[str, Any] = {
    "optim.lr": 1e-30,  # the policy stays where it is
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 1e9,
    "optim.steps_per_iteration": 1,
    "tree.window.every": 10**6,
    "tree.continuation_check": 10**6,
    "evaluation": None,
    "run.checkpoint_every": 10**6,
    "run.sample_every": 10**6,
    "run.tree_every": 10**6,
}


@dataclass(frozen=True)
class Gradients:
    """Independent gradients of one method."""

    vectors: Tensor  # (n, parameters) float32
    rows: float  # of one gradient, in forward rows
    prompts: int
    seconds: float


def prompts_within(recipe: str, rows: int) -> int:
    """How many prompts a budget of rows pays for, at least one."""
    cost = plan(recipe).per_prompt
    return max(round(rows / (cost.rollout_rows + cost.probe_rows + GRADIENT_COST * cost.gradient_rows)), 1)


def collect(recipe: str, count: int, rows: int, seed: int) -> Gradients:
    """The gradients that ``count`` iterations would take, none of which is taken."""
    prompts, start = prompts_within(recipe, rows), time.perf_counter()
    loaded = load_recipe(recipe, {**FIXED, "batch.prompts": prompts, "run.iterations": count, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / "run")
        directory.claim(resume=False)
        session = open_session(read_inputs(loaded), directory, make_accelerator(loaded))
        vectors: list[Tensor] = []

        def keep(*_: Any) -> None:
            parts = [p.grad.flatten().cpu() for p in session.updater.engine.parameters.values() if p.grad is not None]
            vectors.append(torch.cat(parts))

        session.updater.optimizer.optimizer.register_step_pre_hook(keep)
        Trainer(session, []).run(resume=False)
        used = [row["rows/equivalent"] for row in directory.rows(METRICS)]
    return Gradients(torch.stack(vectors), sum(used) / len(used), prompts, time.perf_counter() - start)


def cosine(gram: Tensor) -> float:
    """Mean cosine of two different gradients, from their inner products (n, n)."""
    length = gram.diagonal().sqrt()
    return _between(gram / torch.outer(length, length))


def snr(gram: Tensor) -> float:
    """Signal over noise of one gradient, without bias in either."""
    signal = _between(gram)
    return signal / (float(gram.diagonal().mean()) - signal)


def useful(gram: Tensor, onto: Tensor) -> float:
    """Part of the mean square that lies along a direction: ``onto`` (n,) are the gradients' components along it."""
    count = len(onto)
    along = float(onto.sum() ** 2 - onto.square().sum()) / (count * (count - 1))
    return along / float(gram.diagonal().mean())


def _between(matrix: Tensor) -> float:
    """Mean of what lies off the diagonal."""
    count = len(matrix)
    return float(matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))


def jackknife(figure: Callable[[Tensor], float], count: int) -> tuple[float, float]:
    """A figure of ``count`` gradients, given which of them to use, and its jackknife error."""
    everything = torch.arange(count)
    left_out = torch.tensor([figure(everything[everything != one]) for one in range(count)], dtype=torch.float64)
    spread = float((left_out - left_out.mean()).square().sum())
    return figure(everything), math.sqrt((count - 1) / count * spread)


def figures(gradients: Gradients, direction: Tensor) -> dict[str, tuple[float, float]]:
    """Each figure and its error."""
    vectors, thousands = gradients.vectors.double(), gradients.rows / 1000
    gram, onto = vectors @ vectors.T, vectors @ (direction.double() / direction.double().norm())

    def of(measure: Callable[[Tensor, Tensor], float]) -> tuple[float, float]:
        return jackknife(lambda chosen: measure(gram[chosen][:, chosen], onto[chosen]), len(vectors))

    return {
        "cosine": of(lambda inner, _: cosine(inner)),
        "SNR": of(lambda inner, _: snr(inner)),
        "SNR / 1k rows": of(lambda inner, _: snr(inner) / thousands),
        "useful / 1k rows": of(lambda inner, along: useful(inner, along) / thousands),
    }


def main() -> None:
    """Print a line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--gradients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=3000, help="of one gradient")
    parser.add_argument("--reference", default="dancegrpo", help="the method whose mean gradient is the direction")
    parser.add_argument("--reference-rows", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    reference = collect(
        f"{arguments.recipe}+{arguments.reference}", arguments.gradients, arguments.reference_rows, arguments.seed + 1
    )
    direction = reference.vectors.mean(dim=0)
    print(f"{arguments.recipe}: {arguments.gradients} gradients a method; direction: {arguments.reference}")
    for place, method in enumerate(arguments.methods):
        found = collect(f"{arguments.recipe}+{method}", arguments.gradients, arguments.rows, arguments.seed)
        print_line(method, found, figures(found, direction), heading=place == 0)


def print_line(method: str, found: Gradients, values: dict[str, tuple[float, float]], heading: bool) -> None:
    """One method's line, below a heading if it is the first."""
    columns: Sequence[str] = list(values)
    if heading:
        print(f"{'method':16s} prompts   rows  seconds  " + "  ".join(f"{name:>18s}" for name in columns))
    shown = "  ".join(f"{value:+9.4f} +-{error:7.4f}" for value, error in values.values())
    print(f"{method:16s} {found.prompts:7d} {found.rows:6.0f} {found.seconds:8.1f}  {shown}", flush=True)


if __name__ == "__main__":
    main()
