"""Sizes of the models that recipes train, measured once and kept in model_sizes.json: measuring them takes minutes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from branchtree_adapters.any_pipeline.adapter import Diffusers
from branchtree_adapters.any_pipeline.published import PublishedModel, published_model

from branchtree import load_recipe
from branchtree.planning.plan import RunPlan, plan_recipe
from branchtree.plugins import DecoderFootprint, Footprint
from branchtree.recipe import Recipe, recipe_names
from branchtree.recipe.build import make_model
from branchtree.recipe.load import builtin_folder

FILE = Path(__file__).with_name("model_sizes.json")


def driven_recipes() -> dict[str, PublishedModel]:
    """The recipes that train a published model through its pipeline's own call, by name."""
    found = {}
    for name in recipe_names([builtin_folder()]):
        recipe = load_recipe(name)
        model = published_model(str(recipe.model.options["path"]))
        if recipe.model.adapter == "diffusers" and model is not None:
            found[name] = model
    return found


def stored() -> dict[str, Any]:
    """What is kept, by recipe."""
    text = FILE.read_text(encoding="utf-8") if FILE.is_file() else "{}"
    kept: dict[str, Any] = json.loads(text)
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
    ):
        return plan_recipe(load_recipe(name, overrides))
