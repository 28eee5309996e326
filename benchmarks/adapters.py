"""A hand-written adapter against ``adapter: diffusers`` on the same weights: CPU time of an iteration, and its metrics.

    python benchmarks/adapters.py quickstart
    python benchmarks/adapters.py wan_quickstart model.guidance=4

Both train the same recipe from the same seed in one process, in turn, iteration by iteration. The time is the process's
CPU time, which other work on the machine changes less than the clock's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from contextlib import ExitStack
from typing import Any

from sessions import QUIET, opened

from branchtree.cli.arguments import parse_overrides
from branchtree.recipe import load_recipe
from branchtree.recipe.schema import Recipe
from branchtree.training.iteration import iterate
from branchtree.training.metrics import gather_metrics

SIZES = ("path", "height", "width", "frames", "fps", "negative_prompt")


def driven(recipe: Recipe) -> Recipe:
    """The recipe with its model driven through the pipeline's own call."""
    options = recipe.model.options
    call = {"guidance_scale": options.get("guidance", 0.0)}
    call["max_sequence_length"] = options.get("max_sequence_length", 8)  # what the bundled FLUX's tokenizer takes
    sizes = {name: options[name] for name in SIZES if name in options}
    model: dict[str, Any] = {"adapter": "diffusers", **sizes, "call": call}
    return recipe.model_copy(update={"model": type(recipe.model)(**model)})


def main(words: list[str] | None = None) -> None:
    """Print the medians over iterations, their ratio, and how far metrics are apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    arguments = parser.parse_intermixed_args(words)
    recipe = load_recipe(arguments.recipe, QUIET | parse_overrides(arguments.overrides))
    recipes = {str(recipe.model.adapter): recipe, "diffusers": driven(recipe)}
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    apart = 0.0
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(opened(each)) for name, each in recipes.items()}
        for iteration in range(arguments.iterations):
            found = []
            for name, session in sorted(sessions.items(), reverse=iteration % 2 == 1):
                start = time.process_time()
                done = iterate(session, iteration)
                seconds[name].append(time.process_time() - start)
                found.append(gather_metrics(session, done))
            apart = max(apart, *(_apart(found[0][key], found[1][key]) for key in found[0] if key != "loss"))
    print(f"{arguments.recipe}: {arguments.iterations - 1} iterations of each after one to warm up")
    for name, each in seconds.items():
        print(f"{name:12s} median {statistics.median(each[1:]):.3f} s of CPU, least {min(each[1:]):.3f}")
    own, ours = (each[1:] for each in seconds.values())
    print(f"diffusers / {recipe.model.adapter}: {statistics.median(b / a for a, b in zip(own, ours, strict=True)):.3f}")
    print(f"metrics at most {apart:.1e} apart, relative to their size")


def _apart(one: float, other: float) -> float:
    return 0.0 if one == other or math.isnan(one) else abs(one - other) / max(abs(one), abs(other))


if __name__ == "__main__":
    main()
