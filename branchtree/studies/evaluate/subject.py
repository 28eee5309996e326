"""What is judged: the model that a run trained, or the base model of a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchtree.errors import CheckpointError, RecipeError, shortened
from branchtree.files.names import folder_name
from branchtree.files.reading import user_path
from branchtree.recipe import Recipe, load_recipe
from branchtree.recipe.load import SUFFIXES, recipe_names
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

    @property
    def output(self) -> Path:
        """Where its evaluation is written unless someone says otherwise."""
        return (
            Path("runs") / f"evaluation-{folder_name(self.recipe.name)}"
            if self.run is None
            else self.run / "evaluation"
        )


def find_subject(
    subject: str | Path | Recipe,
    overrides: Mapping[str, Any] | None,
    smoke: bool,
    iteration: int | None,
    lora: str | Path | None = None,
) -> Subject:
    """Read a run's directory, or a recipe by name or YAML path, or take a loaded recipe.

    ``iteration`` picks a run's checkpoint; the newest by default. A ``lora`` file or folder, or a run that trained one,
    takes the place of the run's own weights. Raises RecipeError or CheckpointError.
    """
    if lora is not None:
        return _with_lora(subject, overrides, smoke, iteration, lora)
    if isinstance(subject, Recipe):
        if overrides or smoke:
            raise TypeError("a loaded recipe takes neither overrides nor smoke: give them to load_recipe")
        return _alone(subject, iteration)
    run = RunDirectory(user_path(subject))
    if os.path.isfile(run.recipe_file):
        if smoke:
            raise RecipeError(f"{run.root} is a run, which is judged with the model it trained; leave out --smoke")
        chosen = Subject(load_recipe(run.recipe_file, overrides), run.root, _checkpoint(run, iteration))
        _check_weights(chosen, load_recipe(run.recipe_file))
        return chosen
    if _is_no_recipe(subject, run.root):
        raise RecipeError(
            f"{run.root} is no run's directory: it holds no {run.recipe_file.name}"
            if os.path.isdir(run.root)
            else f"there is no run's directory {shortened(str(run.root))}, and a recipe is given by its name or as a "
            ".yaml file"
        )
    return _alone(load_recipe(subject, overrides, smoke=smoke), iteration)


def _with_lora(
    subject: str | Path | Recipe,
    overrides: Mapping[str, Any] | None,
    smoke: bool,
    iteration: int | None,
    lora: str | Path,
) -> Subject:
    """Take the recipe of a run or of that name, and the LoRA that is judged with its base model."""
    if iteration is not None:
        raise RecipeError("lora: a checkpoint of the run is judged, or a LoRA; leave out one of the two")
    try:
        source = find_start(user_path(lora))
    except (RecipeError, CheckpointError) as error:
        raise type(error)(str(error).replace("model.start:", "lora:", 1)) from None
    run = None if isinstance(subject, Recipe) else RunDirectory(user_path(subject))
    named = run.recipe_file if run is not None and os.path.isfile(run.recipe_file) else subject
    recipe = find_subject(named, overrides, smoke, None).recipe
    if recipe.lora is not None and recipe.model.start is not None:
        raise RecipeError("lora: the recipe starts from a LoRA of its own; leave that out with model.start=null")
    return Subject(recipe, lora=source)


def _is_no_recipe(subject: str | Path, path: Path) -> bool:
    """Whether it can only have been meant as a run's directory: it is a folder, or is written as one lies in others."""
    if path.suffix.partition("+")[0] in SUFFIXES or str(subject) in recipe_names():
        return False
    return os.path.isdir(path) or len(path.parts) > 1


def _alone(recipe: Recipe, iteration: int | None) -> Subject:
    if iteration is not None:
        raise RecipeError("a recipe has no checkpoints; name the directory of a run to judge one of its checkpoints")
    return Subject(recipe)


def _checkpoint(run: RunDirectory, iteration: int | None) -> Path:
    """The newest checkpoint that is whole, or that of an iteration, which must be."""
    newest = newest_whole(run.checkpoints) if iteration is None else None
    if newest is not None:
        return newest
    if iteration is None or not list_checkpoints(run.checkpoints):
        raise CheckpointError(
            f"{run.root}: holds no checkpoint yet; one is written every run.checkpoint_every iterations. To judge the "
            f"base model alone, name {run.recipe_file}"
        )
    return chosen_checkpoint(run.checkpoints, iteration)


def _check_weights(subject: Subject, trained_by: Recipe) -> None:
    """Refuse overrides under which the checkpoint's weights could not be read."""
    if subject.recipe.lora != trained_by.lora:
        raise CheckpointError(f"{subject.checkpoint}: was trained under another 'lora' section; leave lora as it was")
    if subject.checkpoint and subject.recipe.optim.ema and not (subject.checkpoint / AVERAGE).is_file():
        raise CheckpointError(f"{subject.checkpoint}: holds no averaged weights; leave out optim.ema")
