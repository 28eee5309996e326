"""What training changes: the weights, the optimiser's moments, their average and the schedule; saved and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from branchtree.errors import CheckpointError
from branchtree.plugins.protocols import ModelAdapter
from branchtree.recipe.schema import Recipe
from branchtree.run.checkpoint import AVERAGE, OPTIMIZER, Snapshot, read_state
from branchtree.run.contents import Contents
from branchtree.training.engine import Engine, WeightAverage
from branchtree.training.gating import KlGate
from branchtree.training.learning_rate import LearningRate
from branchtree.training.splitting import SplitLearner
from branchtree.training.update import UpdateGuard


@dataclass(frozen=True)
class Progress:
    """Where training stands beside the weights and the optimiser's moments."""

    planned_steps: int  # of the optimiser so far, taken or not
    refused_in_a_row: int
    splits: Mapping[str, Any] | None  # what their rule remembers
    gate: Mapping[str, Any] | None  # what that of the KL term remembers


@dataclass(frozen=True)
class Trained:
    """What training changes in a run. All processes call its methods together."""

    model: ModelAdapter
    engine: Engine
    scheduler: LearningRate
    average: WeightAverage | None
    guard: UpdateGuard
    splits: SplitLearner | None  # where their rule learns
    gate: KlGate | None  # where the KL term has one

    @contextmanager
    def as_exported(self) -> Iterator[None]:
        """A context in which the model holds the weights that ``final/`` would: the average, where there is one."""
        self.engine.forget_copies()
        with nullcontext() if self.average is None else self.average.applied():
            try:
                yield
            finally:
                self.engine.forget_copies()

    def progress(self) -> Progress:
        """Return what training moves along beside the weights."""
        splits = None if self.splits is None else self.splits.state
        gate = None if self.gate is None else self.gate.state
        return Progress(self.scheduler.planned, self.guard.in_a_row, splits, gate)

    def go_back(self, progress: Progress) -> None:
        """Put back what was there when the weights were last changed."""
        self.scheduler.begin(progress.planned_steps)
        self.guard.in_a_row = progress.refused_in_a_row
        if self.splits is not None and progress.splits is not None:
            self.splits.state = progress.splits
        if self.gate is not None and progress.gate is not None:
            self.gate.state = progress.gate

    def exported(self) -> dict[str, Tensor] | None:
        """The weights of ``final/``, to be written by the main process; None: those that the model holds."""
        return self.engine.denoiser_state() if self.average is None else self.average.weights()


def take_snapshot(
    trained: Trained,
    iteration: int,
    recipe: Recipe,
    position: Mapping[str, Any],
    copied: bool,
    contents: Contents,
) -> Snapshot:
    """Copy what is to be saved after ``iteration`` iterations. All processes call this; the main one writes it.

    ``copied`` puts all of it into host memory of its own, so that training can go on while it is written; without it,
    the weights are the live ones. ``position`` is for people who read the state, and ``contents`` are the digests of
    the files that the run reads.
    """
    weights = trained.engine.denoiser_state()
    if weights is None:
        weights = {name: value.detach() for name, value in trained.engine.parameters.items()}
    average = None if trained.average is None else trained.average.state()
    optimizer = trained.engine.optimizer_state()
    return Snapshot(
        weights=_on_host(weights, copied) if copied else weights,
        optimizer=_on_host(optimizer, copied),  # never tagged with a device, so that its bytes do not depend on it
        average=_on_host(average, copied),
        state={
            "iteration": iteration,
            "position": dict(position),
            "refused_in_a_row": trained.guard.in_a_row,
            "average_steps": None if trained.average is None else trained.average.steps,
            "recipe": recipe.model_dump(mode="json"),
            "contents": contents,
            **({} if trained.splits is None else {"splits": trained.splits.state}),
            **({} if trained.gate is None else {"gate": trained.gate.state}),
        },
    )


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
        if trained.splits is not None:
            trained.splits.take_up(state.get("splits"))
        if trained.gate is not None:
            trained.gate.take_up(state.get("gate"))
    except Exception as error:  # torch raises many kinds for a file that it cannot read
        raise CheckpointError(f"{path}: does not fit this run: {type(error).__name__}: {error}") from error
    # The settings are those of the recipe of today, and the schedule stands where its steps so far put it.
    for group, own in zip(trained.engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    trained.scheduler.begin(state["iteration"] * recipe.optim.steps_per_iteration)
    return int(state["iteration"])


def restore_weights(path: Path, model: ModelAdapter, average: WeightAverage | None) -> None:
    """Read back a checkpoint's trained weights, and their average where one is wanted.

    An average that the checkpoint does not hold begins at its weights.
    """
    model.restore(path / "model")
    if average is not None:
        load_average(path, average)


def load_average(path: Path, average: WeightAverage) -> None:
    """Take up a checkpoint's average; one that it does not hold begins at the weights as they are."""
    if (path / AVERAGE).is_file():
        from safetensors.torch import load_file

        state = read_state(path)
        planned = state["iteration"] * state["recipe"]["optim"]["steps_per_iteration"]
        average.load(load_file(path / AVERAGE), state.get("average_steps", planned))  # older checkpoints do not say
    else:
        average.restart()


def _on_host(value: Any, copied: bool) -> Any:
    """Nested tensors on the CPU, those that are there already as they are unless they shall be copied."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=copied)
    if isinstance(value, Mapping):
        return {key: _on_host(entry, copied) for key, entry in value.items()}
    if isinstance(value, list):
        return [_on_host(entry, copied) for entry in value]
    return value
