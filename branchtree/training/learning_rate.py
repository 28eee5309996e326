"""The learning rate, by planned optimiser steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from branchtree.recipe.schema import OptimSection


class LearningRate:
    """Sets an optimiser's learning rate before each of the ``total`` steps that a run plans.

    A step that was skipped, because no edge was trained, or refused counts as well: so a schedule ends where the run
    does, and the number of iterations done alone says where it stands.
    """

    def __init__(self, optimizer: Any, section: OptimSection, total: int) -> None:
        self._optimizer = optimizer
        self._factor = learning_rate_factor(section, total)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.begin(0)

    def begin(self, planned: int) -> None:
        """Set the learning rate of the step that follows ``planned`` others."""
        self.planned = planned
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._factor(planned)

    def step(self) -> None:
        """Go on to the next planned step."""
        self.begin(self.planned + 1)


def learning_rate_factor(section: OptimSection, total: int) -> Callable[[int], float]:
    """The learning rate's factor at each optimiser step: a linear warm-up, then the schedule down to 0 at ``total``."""

    def factor(step: int) -> float:
        if step < section.warmup:
            return (step + 1) / section.warmup
        progress = min((step - section.warmup) / max(total - section.warmup, 1), 1.0)
        if section.schedule == "linear":
            return 1 - progress
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress)))) if section.schedule == "cosine" else 1.0

    return factor
