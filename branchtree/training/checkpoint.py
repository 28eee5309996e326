"""Checkpoints: written whole or not at all, found again by themselves.

A checkpoint is a folder ``checkpoints/iteration_000040``: ``model/`` in the layout of the model's own library,
``optimizer.pt``, ``average.safetensors`` if there is an average, and ``state.json``. All randomness is addressed, so
no generator state is kept.
"""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from branchtree.errors import CheckpointError
from branchtree.protocols import ModelAdapter
from branchtree.recipe.schema import Recipe
from branchtree.training.ema import WeightAverage
from branchtree.training.rundir import write_folder

AVERAGE = "average.safetensors"
FREE_SECTIONS = ("name", "description", "evaluation", "callbacks", "scoring")
FREE_RUN_KEYS = (
    "iterations",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "tree_every",
    "trackers",
)
"""What may change when a run is continued: it does not touch what is learnt."""


@dataclass(frozen=True)
class Trained:
    """The parts of a run that training changes."""

    model: ModelAdapter
    optimizer: Any
    scheduler: Any
    average: WeightAverage | None

    def as_exported(self) -> AbstractContextManager[None]:
        """A context in which the model holds the weights that ``final/`` would: the average, where there is one."""
        return nullcontext() if self.average is None else self.average.applied()


def save_checkpoint(folder: Path, iteration: int, trained: Trained, recipe: Recipe, keep: int) -> None:
    """Write the checkpoint of ``iteration`` done iterations, then delete all but the last ``keep``."""

    def fill(path: Path) -> None:
        trained.model.save(path / "model")
        torch.save(trained.optimizer.state_dict(), path / "optimizer.pt")
        if trained.average is not None:
            from safetensors.torch import save_file

            save_file(trained.average.state(), path / AVERAGE)
        state = {
            "iteration": iteration,
            "scheduler": trained.scheduler.state_dict(),
            "recipe": recipe.model_dump(mode="json"),
        }
        (path / "state.json").write_text(json.dumps(state), encoding="utf-8")

    write_folder(folder / f"iteration_{iteration:06d}", fill)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("iteration_*") if (path / "state.json").is_file())


def load_checkpoint(path: Path, trained: Trained, recipe: Recipe) -> int:
    """Restore a checkpoint in place and return how many iterations were done.

    Raises CheckpointError if it is damaged, or was written under a recipe that would learn something else.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path}: cannot be read: {error}; delete it to use the one before") from error
    _require_same(state["recipe"], recipe.model_dump(mode="json"), path)
    restore_weights(path, trained.model, trained.average)
    trained.optimizer.load_state_dict(optimizer)
    trained.scheduler.load_state_dict(state["scheduler"])
    return int(state["iteration"])


def restore_weights(path: Path, model: ModelAdapter, average: WeightAverage | None) -> None:
    """Read back a checkpoint's trained weights, and their average where one is wanted."""
    model.restore(path / "model")
    if average is not None:
        from safetensors.torch import load_file

        average.load(load_file(path / AVERAGE))


def _require_same(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    first, second = _what_is_learnt(before), _what_is_learnt(now)
    changed = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if changed:
        raise CheckpointError(
            f"{path} was written under another recipe: {', '.join(changed)} changed; "
            "use the same recipe, or another --output"
        )


def _what_is_learnt(recipe: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe, dotted, that decide what is learnt."""
    keys: dict[str, Any] = {}
    for section, value in recipe.items():
        if section not in FREE_SECTIONS:
            keys |= (
                {f"{section}.{key}": part for key, part in value.items()}
                if isinstance(value, dict)
                else {section: value}
            )
    # The length of the run shapes every schedule but the constant one.
    free = [key for key in FREE_RUN_KEYS if key != "iterations" or recipe["optim"]["schedule"] == "constant"]
    return {key: value for key, value in keys.items() if key.removeprefix("run.") not in free}
