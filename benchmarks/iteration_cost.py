"""What an iteration costs under other methods than 16 independent trajectories, and what shared families alone save.

The small FLUX at 64 x 64 pixels. In each round every variant does the same iteration, in turn, on one model: rollout,
decoding, reward, credit and update. Figures are processor time, medians over rounds.

    python benchmarks/iteration_cost.py
    python benchmarks/iteration_cost.py --methods dancegrpo branchgrpo width_pruned extreme_pruned depth_pruned mix

The gradient pass is done twice on the same trees: as it is, siblings sharing one forward of their parent, and edge by
edge, with a forward for each edge. The share that sharing saves is predicted by counts, 1 - families / edges.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from typing import Any

from operations import seconds_of
from sessions import QUIET, Prompts, credited, edge_by_edge, grown, opened, under, updated

from branchtree.recipe import load_recipe
from branchtree.training.session import Session

BASELINE = "dancegrpo"
METHODS = (BASELINE, "branchgrpo", "mix", "single")


@dataclass
class Tally:
    """One variant's rows, and its seconds of processor time by round."""

    rollout_rows: int = 0
    families: int = 0
    edges: int = 0
    grow: list[float] = field(default_factory=list)  # rollout, decoding and reward
    shared: list[float] = field(default_factory=list)  # credit, gradient pass and optimiser
    apart: list[float] = field(default_factory=list)  # the same, edge by edge

    @property
    def iteration(self) -> float:
        """Median of a whole iteration."""
        return statistics.median(a + b for a, b in zip(self.grow, self.shared, strict=True))

    @property
    def predicted_saving(self) -> float:
        """What sharing parents saves in the gradient pass, from counts."""
        return 1 - self.families / self.edges

    @property
    def saving(self) -> float:
        """The same as measured, median over rounds."""
        return statistics.median(1 - a / b for a, b in zip(self.shared, self.apart, strict=True))


def do_round(session: Session, iteration: int, tally: Tally, apart_first: bool) -> None:
    """One iteration of a variant, its gradient pass in both ways."""
    prompts = Prompts.of(session, iteration)
    seconds, (tree, scores) = seconds_of(lambda: grown(session, iteration, prompts), session.device)
    families = credited(session, iteration, tree, scores)

    def shared() -> None:
        updated(session, iteration, tree, credited(session, iteration, tree, scores), prompts)

    def apart() -> None:
        updated(session, iteration, tree, edge_by_edge(credited(session, iteration, tree, scores)), prompts)

    ways = [(tally.shared, shared), (tally.apart, apart)]
    for times, way in reversed(ways) if apart_first else ways:
        times.append(seconds_of(way, session.device)[0])
    tally.grow.append(seconds)
    tally.rollout_rows, tally.families, tally.edges = tree.topology.rollout_rows, len(families), families.edges


def measure(
    recipe: str, methods: list[str], overrides: dict[str, Any], rounds: int, iteration: int
) -> dict[str, Tally]:
    """Rounds of all methods in turn, after one that warms up."""
    recipes = {method: load_recipe(f"{recipe}+{method}", {**QUIET, **overrides}) for method in methods}
    tallies = {method: Tally() for method in methods}
    with opened(recipes[methods[0]]) as session:
        sessions = {method: under(session, loaded) for method, loaded in recipes.items()}
        for place in range(rounds + 1):
            for method in methods if place % 2 else reversed(methods):
                do_round(sessions[method], iteration + place, tallies[method] if place else Tally(), place % 2 == 0)
    return tallies


def print_tables(tallies: dict[str, Tally]) -> None:
    """Iterations against the baseline, then sharing against its prediction."""
    whole = tallies[BASELINE].iteration if BASELINE in tallies else None
    print(
        "| method | rollout rows | trained rows | grow and score, s | update, s | iteration, s | of 16 trajectories' |"
    )
    print("|" + " --- |" * 7)
    for method, tally in tallies.items():
        ratio = f"{tally.iteration / whole:.3f}" if whole else "-"
        grow, update = statistics.median(tally.grow), statistics.median(tally.shared)
        print(
            f"| `{method}` | {tally.rollout_rows} | {tally.families} | {grow:.3f} | {update:.3f} "
            f"| {tally.iteration:.3f} | {ratio} |"
        )
    print("\n| method | families | edges | update, s | edge by edge, s | saved | predicted |")
    print("|" + " --- |" * 7)
    for method, tally in tallies.items():
        update, apart = statistics.median(tally.shared), statistics.median(tally.apart)
        print(
            f"| `{method}` | {tally.families} | {tally.edges} | {update:.3f} | {apart:.3f} "
            f"| {tally.saving:.1%} | {tally.predicted_saving:.1%} |"
        )


def main(words: list[str] | None = None) -> dict[str, Tally]:
    """Print the tables; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iteration", type=int, default=150, help="where a sliding window stands")
    arguments = parser.parse_args(words)
    overrides = {"model.height": arguments.size, "model.width": arguments.size, "batch.prompts": arguments.prompts}
    tallies = measure(arguments.recipe, arguments.methods, overrides, arguments.rounds, arguments.iteration)
    print(f"{arguments.recipe} at {arguments.size} x {arguments.size}, {arguments.prompts} prompts, medians of")
    print(f"{arguments.rounds} rounds from iteration {arguments.iteration} on, processor time\n")
    print_tables(tallies)
    return tallies


if __name__ == "__main__":
    main()
