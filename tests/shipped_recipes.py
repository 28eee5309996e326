"""The shipped recipes' small versions: which are trained on which device, and what a run of one has to show."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from branchtree_adapters.small.pipelines import PIPELINES, Small
from diffusers import DiffusionPipeline, WanImageToVideoPipeline
from small_pipelines import small_constants
from training_runs import metrics

from branchtree import load_recipe
from branchtree.recipe.load import builtin_folder, recipe_names

SMALL_WAN = Path(__file__).parents[1] / "adapters/branchtree_adapters/assets/moving_digits_wan"
SHIPPED = dict(sorted(recipe_names([builtin_folder()]).items()))
DRIVEN = [name for name, path in SHIPPED.items() if "extends: models/" in path.read_text(encoding="utf-8")]
"""The recipes of published models that drive a pipeline of diffusers."""
WRITTEN_BY_HAND = [name for name in SHIPPED if load_recipe(name).model.adapter != "diffusers"]


def _one_of_each(names: Collection[str]) -> list[str]:
    """The first of those recipes whose small versions differ in their trees, credit and losses alone."""
    found: dict[str, str] = {}
    for name in names:
        recipe = load_recipe(name, smoke=True)
        shared = recipe.model_dump_json(include={"model", "lora", "rewards", "data", "evaluation"})
        found.setdefault(f"{shared} {recipe.run.precision}", name)
    return list(found.values())


ON_GPU = [
    *_one_of_each(WRITTEN_BY_HAND),
    "flux_kontext_edit_branchgrpo",
]
"""Those that test_gpu_runs.py trains on the pretended GPU; all others are trained on a CPU."""


def small_family(name: str) -> Small:
    """The small pipeline that a recipe's small version drives."""
    return PIPELINES[str(load_recipe(name, smoke=True).model.options["path"]).removeprefix("small:")]


def constants_of(name: str) -> AbstractContextManager[None]:
    """A context in which the small pipeline that a recipe drives makes small images."""
    return small_constants(small_family(name)) if name in DRIVEN else nullcontext()


def require_shipped(name: str, run: Path, before: Collection[str] | None) -> None:
    """Assert that a run of a small version had the recipe's own rewards, held-out ones too, and left a whole model.

    Rewards with published weights have tiny random ones. ``before``: the held-out figures, where the run had some.
    """
    full, recipe = load_recipe(name), load_recipe(name, smoke=True)
    assert [section.reward for section in recipe.rewards] == [section.reward for section in full.rewards]
    (row,) = metrics(run)
    assert all(f"reward/{section.label or section.reward}/mean" in row for section in recipe.rewards)
    assert full.evaluation and recipe.evaluation
    held_out = [section.label or section.reward for section in full.evaluation.rewards]
    assert [section.label or section.reward for section in recipe.evaluation.rewards] == held_out
    assert before is None or set(before) == set(held_out)
    if name in DRIVEN or (recipe.lora and recipe.model.adapter == "flux"):  # whose files test_flux_adapter.py reads
        assert any((run / "final").rglob("*.safetensors"))
    elif recipe.lora:
        WanImageToVideoPipeline.from_pretrained(SMALL_WAN).load_lora_weights(run / "final")
    else:
        DiffusionPipeline.from_pretrained(run / "final")
