"""What a study samples: the model that a run trained, a LoRA, or the base model of a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError, RecipeError, shortened
from branchtree.files.names import default_output
from branchtree.files.reading import user_path
from branchtree.recipe import Recipe, load_recipe
from branchtree.recipe.load import SUFFIXES, recipe_names, resolve_recipe
from branchtree.run.checkpoint import AVERAGE, chosen_checkpoint, iteration_of, list_checkpoints, newest_whole
from branchtree.run.directory import RunDirectory
from branchtree.run.start import find_start


@dataclass(frozen=True)
class Subject:
    """A recipe, and the checkpoint of the run that was trained by it, or a LoRA; neither: the base model alone."""

    recipe: Recipe
    run: Path | None = None
    checkpoint: Path | None = None
    lora: Path | None = None

    @property
    def iteration(self) -> int | None:
        """How many iterations the checkpoint was trained for."""
        return None if self.checkpoint is None else iteration_of(self.checkpoint)

    def output(self, study: str) -> Path:
        """The folder that a study of that name writes to by default."""
        return default_output(self.recipe.name, study) if self.run is None else self.run / study


def find_subject(
    subject: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    smoke: bool = False,
    iteration: int | None = None,
    lora: str | Path | None = None,
) -> Subject:
    """Read a run's directory, or a recipe by name or YAML path, or take a loaded recipe.

    ``iteration`` picks a run's checkpoint; the newest by default. A ``lora`` file or folder, or a run that trained one,
    stands in for the run's own weights. Raises RecipeError or CheckpointError.
    """
    run = None if isinstance(subject, Recipe) else _find_run(subject)
    if run is not None and lora is None:
        return _trained(run, overrides, smoke, iteration)
    if lora is not None and iteration is not None:
        raise RecipeError("lora: a checkpoint of the run is judged, or a LoRA; leave out one of the two")
    weights = None if lora is None else _find_lora(lora)
    recipe = resolve_recipe(subject if run is None else run.recipe_file, overrides, smoke)
    if iteration is not None:
        raise RecipeError("a recipe has no checkpoints; name the directory of a run to judge one of its checkpoints")
    if weights is not None and recipe.lora is not None and recipe.model.start is not None:
        raise RecipeError("lora: the recipe starts from a LoRA of its own; leave that out with model.start=null")
    return Subject(recipe, lora=weights)


def _find_run(subject: str | Path) -> RunDirectory | None:
    """Return the run whose directory this is, or None for a recipe's name or file.

    Raises RecipeError for what can only be meant as a run's directory, a folder or a path in one, and is none.
    """
    run = RunDirectory(user_path(subject))
    if os.path.isfile(run.recipe_file):
        return run
    if run.root.suffix.partition("+")[0] in SUFFIXES or str(subject) in recipe_names():
        return None
    if os.path.isdir(run.root):
        raise RecipeError(f"{run.root} is no run's directory: it holds no {run.recipe_file.name}")
    if len(run.root.parts) > 1:
        named = shortened(str(run.root))
        raise RecipeError(f"there is no run's directory {named}, and a recipe is given by its name or as a .yaml file")
    return None


def _find_lora(lora: str | Path) -> Path:
    try:
        return find_start(user_path(lora))
    except (RecipeError, CheckpointError) as error:
        raise type(error)(str(error).replace("model.start:", "lora:", 1)) from None


def _trained(run: RunDirectory, overrides: Mapping[str, Any] | None, smoke: bool, iteration: int | None) -> Subject:
    """Return a run and its checkpoint. Refuses overrides under which the checkpoint's weights could not be read."""
    if smoke:
        raise RecipeError(f"{run.root} is a run, which is judged with the model it trained; leave out --smoke")
    recipe, checkpoint = load_recipe(run.recipe_file, overrides), _checkpoint(run, iteration)
    if recipe.lora != load_recipe(run.recipe_file).lora:
        raise CheckpointError(f"{checkpoint}: was trained under another 'lora' section; leave lora as it was")
    if recipe.optim.ema and not (checkpoint / AVERAGE).is_file():
        raise CheckpointError(f"{checkpoint}: holds no averaged weights; leave out optim.ema")
    return Subject(recipe, run.root, checkpoint)


def _checkpoint(run: RunDirectory, iteration: int | None) -> Path:
    """Return the newest checkpoint that is whole, or that of an iteration, which must be."""
    newest = newest_whole(run.checkpoints) if iteration is None else None
    if newest is not None:
        return newest
    if iteration is None or not list_checkpoints(run.checkpoints):
        raise CheckpointError(
            f"{run.root}: holds no checkpoint yet; one is written every run.checkpoint_every iterations. To judge the "
            f"base model alone, name {run.recipe_file}"
        )
    return chosen_checkpoint(run.checkpoints, iteration)
