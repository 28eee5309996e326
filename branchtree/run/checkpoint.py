"""Checkpoints: written whole or not at all, found again by themselves, and checked before they are used.

A checkpoint is a folder ``checkpoints/iteration_000040``: ``model/`` in the layout of the model's own library,
``optimizer.pt``, ``average.safetensors`` if there is an average, ``state.json``, and ``manifest.json``, which is
written last and holds the size and SHA-256 of all the others. All randomness is addressed, so no generator state is
kept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import CheckpointError
from branchtree.files.json_lines import read_json_object
from branchtree.files.writing import free_name, writing
from branchtree.plugins.protocols import ModelAdapter
from branchtree.run.directory import CHECKPOINT
from branchtree.run.ledger import Ledger
from branchtree.run.manifest import require_whole

log = logging.getLogger("branchtree")

AVERAGE, OPTIMIZER, STATE = "average.safetensors", "optimizer.pt", "state.json"
DAMAGED, LATER = "damaged_", "later_"
"""What a checkpoint's name begins with once training has gone on without it: a damaged one, or one not chosen."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in memory."""

    weights: Mapping[str, Tensor]  # every trainable parameter, by its name in the denoiser
    optimizer: Mapping[str, Any]  # its state on the CPU
    average: Mapping[str, Tensor] | None
    state: Mapping[str, Any]  # what state.json says

    @property
    def iteration(self) -> int:
        """How many iterations were done."""
        return int(self.state["iteration"])


def write_checkpoint(ledger: Ledger, folder: Path, snapshot: Snapshot, model: ModelAdapter, keep: int) -> None:
    """Write a checkpoint, then delete all but the last ``keep`` that the run wrote, by the record of its folder.

    Raises OutputError if the disk refuses.
    """

    def fill(path: Path) -> None:
        model.save(path / "model", snapshot.weights)
        with (path / OPTIMIZER).open("wb") as file:  # a file of ours, so that its errors are Python's
            torch.save(dict(snapshot.optimizer), file)
        if snapshot.average is not None:
            from safetensors.torch import save_file

            save_file(dict(snapshot.average), path / AVERAGE)
        (path / STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")

    target = folder / f"iteration_{snapshot.iteration:06d}"
    with writing(target):
        ledger.write_folder(target, fill)
        for old in [path for path in list_checkpoints(folder) if ledger.owns(path)][:-keep]:
            ledger.remove_folder(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; whether they are whole is another matter."""
    found = [path for path in folder.glob("iteration_*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=iteration_of)


def iteration_of(path: Path) -> int:
    """Return how many iterations a checkpoint was trained for, by its name."""
    return int(path.name.removeprefix("iteration_"))


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None if there are no checkpoints.

    Newer ones that are damaged are named in the log. Raises CheckpointError if all of them are.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            require_usable(path)
        except CheckpointError as error:
            log.warning("the checkpoint %s is damaged and passed over: %s", path.name, error)
        else:
            return path
    if checkpoints:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole ({len(checkpoints)} looked at; the log says what is wrong with each). "
            "Put back a good copy of one, or start again with another --output"
        )
    return None


def chosen_checkpoint(folder: Path, iteration: int) -> Path:
    """Return the checkpoint of ``iteration`` done iterations. Raises CheckpointError if it is not there or damaged."""
    found = {iteration_of(path): path for path in list_checkpoints(folder)}
    if iteration not in found:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise CheckpointError(f"{folder.parent}: holds no checkpoint of iteration {iteration}; it has {there}")
    require_usable(found[iteration])
    return found[iteration]


def require_usable(path: Path) -> None:
    """Check all files of a checkpoint. Raises CheckpointError naming the first that is damaged."""
    require_whole(path)
    read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint's state.json says. Raises CheckpointError if it cannot be read."""
    try:
        state = read_json_object(path / STATE, CheckpointError)
        if not isinstance(state["recipe"]["optim"], dict) or int(state["iteration"]) != iteration_of(path):
            raise ValueError("it belongs to another checkpoint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / STATE}: cannot be read ({type(error).__name__}: {error})") from error
    return dict(state)


def set_aside(ledger: Ledger, folder: Path, used: Path, prefix: str) -> list[Path]:
    """Give another name to the checkpoints that are newer than the one used, so that they never count again."""
    moved = []
    for path in list_checkpoints(folder):
        if iteration_of(path) > iteration_of(used):
            target = free_name(path.with_name(f"{prefix}{path.name}"))
            ledger.rename(path, target)
            moved.append(target)
    return moved
