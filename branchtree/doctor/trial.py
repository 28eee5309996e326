"""One tiny iteration, from encoding to a checkpoint, in a folder that is then removed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from branchtree.doctor.check import Check
from branchtree.errors import RecipeError
from branchtree.recipe import Recipe, load_recipe

TINY: Mapping[str, Any] = {"run.iterations": 1, "evaluation": None, "callbacks": [], "run.trackers": []}
SMALLEST = "quickstart"


def small_recipe(recipe: str) -> Recipe:
    """Return the small version of a recipe, or the smallest recipe for one without, cut to an iteration."""
    try:
        return load_recipe(recipe, TINY, smoke=True)
    except RecipeError:
        return load_recipe(SMALLEST, TINY)


def check_iteration(recipe: str) -> Iterator[Check]:
    """Train for one iteration. Raises a BranchTreeError where that fails."""
    from branchtree.planning.devices import named_device
    from branchtree.training.trainer import train_recipe

    small = small_recipe(recipe)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="branchtree-doctor-") as folder:
        result = train_recipe(small, Path(folder) / "run", resume=False, force=True)
    if not result.finished:
        yield Check("iteration", "fail", f"one of {small.name} was stopped", "run the doctor again")
        return
    seconds, model = time.perf_counter() - start, small.model.options.get("path", small.model.adapter)
    text = f"one of {small.name} with {model} on {named_device('auto')} took {seconds:.1f} s, loading included"
    yield Check("iteration", "ok", text)
