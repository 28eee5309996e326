"""Measure the models of the recipes that drive a published pipeline of diffusers, for docs/models.md.

Sizes are kept in model_sizes.json, since measuring takes minutes; ``build_reference.py`` writes the page by them.

    python scripts/build_models.py                      the recipes whose model's options have changed
    python scripts/build_models.py RECIPE [RECIPE ...]  these
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from branchtree_adapters.any_pipeline.adapter import Diffusers
from branchtree_adapters.any_pipeline.families import FAMILIES
from branchtree_adapters.any_pipeline.published import PublishedModel, published_model, published_models

from branchtree import load_recipe
from branchtree.planning.gpus import GIB
from branchtree.planning.plan import RunPlan, plan_recipe
from branchtree.plugins import DecoderFootprint, Footprint
from branchtree.recipe import Recipe, recipe_names
from branchtree.recipe.build import make_model
from branchtree.recipe.load import builtin_folder

FILE = Path(__file__).with_name("model_sizes.json")
CARDS = (24, 48, 80, 141)
"""Memory of well-known GPUs in GB, by their names."""
HEADROOM = 0.85
"""The fraction of a GPU that a plan may take: rewards and the decoder at work need the rest."""
OTHER_RECIPES = {"FLUX.1-dev": ("flux_t2i_branchgrpo", {"lora.rank": 64}), "Wan2.1-T2V-1.3B": ("wan_t2v_motion", {})}
OTHER_RECIPES["Wan2.1-I2V-14B-480P"] = ("wan_i2v_14b_motion", {})
"""Recipes with an adapter written by hand."""


def driven_recipes() -> dict[str, PublishedModel]:
    """The recipes that train a published model through its pipeline's own call, by name."""
    found = {}
    for name in recipe_names([builtin_folder()]):
        recipe = load_recipe(name)
        model = published_model(str(recipe.model.options["path"]))
        if recipe.model.adapter == "diffusers" and model is not None:
            found[name] = model
    return found


# Sizes


def stored() -> dict[str, Any]:
    """What is kept, by recipe."""
    kept: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    return kept


def options(recipe: Recipe) -> Mapping[str, Any]:
    """What a model's sizes depend on, as JSON has it."""
    written: Mapping[str, Any] = json.loads(json.dumps(recipe.model.options))
    return written


def measure(name: str) -> None:
    """Measure the model of a recipe, and keep its sizes."""
    recipe = load_recipe(name)
    sizes = asdict(make_model(recipe).footprint())
    entries = {**stored(), name: {"model": options(recipe), "sizes": sizes}}
    FILE.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n", encoding="utf-8")


def footprint(name: str) -> Footprint:
    """The sizes that are kept for a recipe."""
    sizes = dict(stored()[name]["sizes"])
    decoder = sizes.pop("decoder")
    sizes["latent_shape"] = tuple(sizes["latent_shape"])
    return Footprint(**sizes, decoder=None if decoder is None else DecoderFootprint(**decoder))


def kept_plan(name: str, overrides: Mapping[str, Any] | None = None) -> RunPlan:
    """The plan of a recipe, by the sizes that are kept."""
    sizes = footprint(name)
    with (
        mock.patch.object(Diffusers, "footprint", lambda self: sizes),
        mock.patch.object(Diffusers, "rows_per_prediction", sizes.rows_per_prediction),
        mock.patch.object(Diffusers, "check"),  # of prompts, which takes a pipeline
    ):
        return plan_recipe(load_recipe(name, overrides))


def smallest_card(plan: RunPlan) -> int | None:
    """The smallest of the cards that a plan leaves room on; None if there is none."""
    usable = {fit.gpu.name.partition("(")[2].split()[0]: fit.gpu.usable for fit in reversed(plan.fits)}
    return next((card for card in CARDS if plan.memory.device < HEADROOM * usable[str(card)]), None)


# Sections of docs/models.md


def model_table() -> str:
    """The published models: what they are, what the driver does with them, and what training a LoRA takes."""
    kept = stored()
    recipes: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [entry] for name, entry in OTHER_RECIPES.items()}
    for name, model in driven_recipes().items():
        if model.name not in OTHER_RECIPES:
            recipes.setdefault(model.name, []).append((name, {}))
    lines = [
        "| model | hub id | task | licence | pipeline | rows x calls | recipe | plan | verified |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in published_models():
        entries = recipes.get(model.name, [])
        shown = ", ".join(" ".join([f"`{name}`", *(f"`{k}={v}`" for k, v in given.items())]) for name, given in entries)
        plans = [kept_plan(name) if name in kept else plan_recipe(load_recipe(name, given)) for name, given in entries]
        cells = (model.name, f"`{model.ids[0]}`", model.task, model.licence, f"`{model.pipeline}`", model.work)
        needs = "; ".join(map(_needs, plans))
        lines.append(f"| {' | '.join((*cells, shown, needs, 'T, P' if model.small else ''))} |")
    return "\n".join(lines)


def _needs(plan: RunPlan) -> str:
    """What a plan takes of a GPU, in words."""
    card = smallest_card(plan)
    return f"{plan.memory.device / GIB:.0f} GiB" + (f", {card} GB GPU" if card else "")


def source_table() -> str:
    """Where the configuration of each published model comes from."""
    lines = ["| model | configuration from |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {model.name} | {model.source} |" for model in published_models())])


def refused_table() -> str:
    """The pipelines and settings that are refused, by the table of families."""
    lines = ["| pipeline | refused because |", "| --- | --- |"]
    for name, family in sorted(FAMILIES.items()):
        reasons = [family.untrainable] if family.untrainable else [refusal.remedy for refusal in family.refused]
        lines += [f"| `{name}` | {reason} |" for reason in reasons]
    return "\n".join(lines)


SECTIONS = {"published-models": model_table, "published-sources": source_table, "refused-pipelines": refused_table}


def main() -> None:
    """Measure the recipes that are named, or those whose models have changed."""
    kept = stored()
    stale = [name for name in driven_recipes() if kept.get(name, {}).get("model") != options(load_recipe(name))]
    for name in sys.argv[1:] or stale:
        print(f"measuring {name}", flush=True)
        measure(name)


if __name__ == "__main__":
    main()
