"""Going on from a checkpoint: what it holds is put back, and what the recipe now says is taken up."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from branchtree.errors import BranchTreeError, CheckpointError
from branchtree.recipe.paths import make_absolute
from branchtree.recipe.schema import Recipe
from branchtree.recipe.source import Source
from branchtree.run.contents import Contents
from branchtree.training.changes import require_same_recipe, unused
from branchtree.training.checkpoint import (
    OPTIMIZER,
    Trained,
    chosen_checkpoint,
    load_average,
    newest_whole,
    read_state,
)
from branchtree.training.session import Inputs

log = logging.getLogger("branchtree")


def agreed_checkpoint(
    accelerator: Any, folder: Path, inputs: Inputs, allow: Sequence[str], iteration: int | None = None
) -> Path | None:
    """``find_checkpoint`` as the main process sees the folder; it gives the same, or fails, on all."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = find_checkpoint(folder, inputs.recipe, allow, inputs.contents, iteration)
        except BranchTreeError as error:
            found[1] = error
    path, problem = broadcast_object_list(found)
    if problem is not None:
        raise problem
    return None if path is None else Path(path)


def find_checkpoint(
    folder: Path,
    recipe: Recipe,
    allow: Sequence[str],
    contents: Contents | None = None,
    iteration: int | None = None,
) -> Path | None:
    """The newest checkpoint that is whole, or that of ``iteration``, if it can be gone on from; None without any.

    ``contents`` are the digests of the files that are read now. Raises CheckpointError if no checkpoint is whole, or it
    was written under a recipe or files that would learn something else in keys that ``allow`` does not name;
    RecipeError for an allowed key that does not exist.
    """
    path = newest_whole(folder) if iteration is None else chosen_checkpoint(folder, iteration)
    if path is None:
        return None
    state = read_state(path)
    files: tuple[Contents, Contents] = ({}, {})
    if contents is not None and "contents" in state:
        files = (state["contents"], contents)
    elif contents is not None:
        log.warning("%s holds no digests of files: whether prompts, model and rewards are as before is not known", path)
    changes = require_same_recipe(as_of_now(state["recipe"]), recipe.model_dump(mode="json"), allow, path, files)
    if state["iteration"] > recipe.run.iterations:
        raise CheckpointError(f"{path}: {state['iteration']} iterations are done, more than run.iterations asks for")
    for change in changes:
        log.warning("from iteration %d on, %s", state["iteration"], change)
    for key in unused(allow, changes):
        log.warning("--allow %s: nothing changed there", key)
    return path


def as_of_now(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's recipe with the defaults of keys that it did not know yet, and with absolute paths."""
    source = Source(copy.deepcopy(recipe))
    make_absolute(source)
    try:
        return Recipe.model_validate(source.data).model_dump(mode="json")
    except ValidationError:  # another version's; what differs is named as it stands
        return source.data


def load_checkpoint(path: Path, trained: Trained, recipe: Recipe) -> int:
    """Take up what a checkpoint holds beside the weights, and return how many iterations were done.

    The weights are read before this, while they are whole on every process. ``path`` comes from ``find_checkpoint``.
    Raises CheckpointError if the checkpoint does not fit.
    """
    state = read_state(path)
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in trained.engine.optimizer.param_groups
    ]
    if trained.average is not None:
        load_average(path, trained.average)
    try:
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
        trained.engine.load_optimizer(optimizer)
        trained.guard.in_a_row = int(state["refused_in_a_row"])
    except Exception as error:  # torch raises many kinds for a file that it cannot read
        raise CheckpointError(f"{path}: does not fit this run: {type(error).__name__}: {error}") from error
    # The settings are those of the recipe of today, and the schedule stands where its steps so far put it.
    for group, own in zip(trained.engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    trained.scheduler.begin(state["iteration"] * recipe.optim.steps_per_iteration)
    return int(state["iteration"])
