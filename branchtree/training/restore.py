"""Going on from a checkpoint: what it holds is put back, and what the recipe now says is taken up."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from branchtree.errors import CheckpointError
from branchtree.recipe.schema import Recipe
from branchtree.training.changes import require_same, unused
from branchtree.training.checkpoint import OPTIMIZER, Trained, read_state, restore_weights

log = logging.getLogger("branchtree")


def load_checkpoint(path: Path, trained: Trained, recipe: Recipe, allow: Sequence[str] = ()) -> int:
    """Restore a checkpoint in place and return how many iterations were done.

    It is taken to be whole: see ``newest_whole``. Raises CheckpointError if it does not fit, or was written under a
    recipe that would learn something else in keys that ``allow`` does not name; RecipeError for an allowed key that
    does not exist.
    """
    state = read_state(path)
    now = recipe.model_dump(mode="json")
    changes = require_same(state["recipe"], now, allow, path)
    fresh = [dict(group) for group in trained.optimizer.param_groups]
    restore_weights(path, trained.model, trained.average)
    try:
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
        trained.optimizer.load_state_dict(optimizer)
        trained.scheduler.load_state_dict(state["scheduler"])
        trained.guard.in_a_row = int(state["refused_in_a_row"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: does not fit this run: {type(error).__name__}: {error}") from error
    if state["recipe"]["optim"] != now["optim"] or state["recipe"]["run"]["iterations"] != recipe.run.iterations:
        _take_up(trained, fresh)
    for change in changes:
        log.warning("from iteration %d on, %s", state["iteration"], change)
    for key in unused(allow, changes):
        log.warning("--allow %s: nothing changed there", key)
    return int(state["iteration"])


def _take_up(trained: Trained, fresh: Sequence[dict[str, Any]]) -> None:
    """Give the optimiser the settings of the recipe of today: those that came with the checkpoint are of its own."""
    scheduler = trained.scheduler
    scheduler.base_lrs = [group["initial_lr"] for group in fresh]
    for group, new, base, factor in zip(
        trained.optimizer.param_groups, fresh, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        kept = {"params", "lr"}
        group.update({name: value for name, value in new.items() if name not in kept})
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in trained.optimizer.param_groups]
