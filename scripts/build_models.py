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
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from branchtree_adapters.any_pipeline.adapter import Diffusers
from branchtree_adapters.any_pipeline.families import FAMILIES
from branchtree_adapters.any_pipeline.published import PublishedModel, published_model, published_models
from branchtree_adapters.small.pipelines import PIPELINES

from branchtree import load_recipe
from branchtree.cli.display import planned_seconds
from branchtree.planning.fitting import Changes, in_words
from branchtree.planning.gpus import GIB
from branchtree.planning.plan import RunPlan, plan_recipe
from branchtree.plugins import DecoderFootprint, Footprint, QuantizableFootprint
from branchtree.recipe import Recipe, recipe_names
from branchtree.recipe.build import make_model
from branchtree.recipe.load import builtin_folder

FILE = Path(__file__).with_name("model_sizes.json")
CARDS = (24, 48, 80, 141)
"""Memory of well-known GPUs in GB, by their names."""
HEADROOM = 0.85
"""The fraction of a GPU that a plan may take: rewards and the decoder at work need the rest."""
OTHER_RECIPES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "FLUX.1-dev": {"flux_t2i_branchgrpo": {"lora.rank": 64}, "flux_t2i_branchgrpo_24gb": {}},
    "Wan2.1-T2V-1.3B": {"wan_t2v_motion": {}, "wan_t2v_motion_24gb": {}},
    "Wan2.1-I2V-14B-480P": {"wan_i2v_14b_motion": {}},
}
"""Recipes with an adapter written by hand, and what they need to train a LoRA."""
SHOWN_GPUS = ("RTX 4090 (24 GB)", "L40S (48 GB)", "A100 (80 GB)")
"""The cards for which the page says whether a recipe fits, the smallest of their size."""


@cache
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
    sizes["latent_shape"] = tuple(sizes["latent_shape"])
    for key, kind in (("decoder", DecoderFootprint), ("quantizable", QuantizableFootprint)):
        sizes[key] = None if sizes[key] is None else kind(**sizes[key])
    return Footprint(**sizes)


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


@cache
def plans_of(model: str) -> Mapping[str, RunPlan]:
    """The plans of the recipes that train a LoRA of a published model, by name and keys as a command line has them."""
    driven: Mapping[str, Mapping[str, Any]] = {
        name: {} for name, found in driven_recipes().items() if found.name == model
    }
    return {
        " ".join([name, *(f"{key}={value}" for key, value in given.items())]): (
            kept_plan(name) if name in stored() else plan_recipe(load_recipe(name, given))
        )
        for name, given in OTHER_RECIPES.get(model, driven).items()
    }


def model_table() -> str:
    """The published models: what they are, how they are called, and how far they were checked."""
    lines = [
        "| model | family | hub id | task | size | licence | pipeline | rows x calls | verified |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in published_models():
        size = next(iter(plans_of(model.name).values())).footprint.denoiser_parameters / 1e9
        known = (model.name, model.family, f"`{model.ids[0]}`", model.task, f"{size:.1f} B", model.licence)
        lines.append(f"| {' | '.join((*known, f'`{model.pipeline}`', model.work, _level(model)))} |")
    return "\n".join(lines)


def _level(model: PublishedModel) -> str:
    """How far a model was checked: what is so of its small pipelines, all of which the tests run."""
    return "T, P" if model.small and set(model.small) <= PIPELINES.keys() else ""


def training_table() -> str:
    """The recipes of published models: what an iteration is, which memory it takes, and what fits on which card."""
    cards = [name.partition("(")[2].rstrip(")") for name in SHOWN_GPUS]
    lines = [
        f"| model | recipe | rows, rollout + gradient | seconds | memory | {' | '.join(cards)} |",
        f"| --- | --- | --- | --- | --- |{' --- |' * len(cards)}",
    ]
    for model in published_models():
        for command, plan in plans_of(model.name).items():
            rows = f"{plan.rollout_rows:,} + {plan.gradient_rows:,}"
            figures = (rows, f"{sum(planned_seconds(plan)):,.0f}", f"{plan.memory.device / GIB:.0f} GiB")
            fits = {fit.gpu.name: _fit(fit.changes) for fit in plan.fits}
            cells = (model.name, f"`{command}`", *figures, *(fits[name] for name in SHOWN_GPUS))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _fit(changes: Changes | None) -> str:
    """Whether a plan fits on a card, or what must change."""
    if changes is None:
        return "no"
    return ", ".join(f"`{word}`" for word in in_words(changes).split()) or "yes"


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


SECTIONS = {
    "published-models": model_table,
    "published-training": training_table,
    "published-sources": source_table,
    "refused-pipelines": refused_table,
}


def main() -> None:
    """Measure the recipes that are named, or those whose models have changed."""
    kept = stored()
    stale = [name for name in driven_recipes() if kept.get(name, {}).get("model") != options(load_recipe(name))]
    for name in sys.argv[1:] or stale:
        print(f"measuring {name}", flush=True)
        measure(name)


if __name__ == "__main__":
    main()
