"""The rewards ``reach`` and ``pusht``: what comes of a chunk of actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pydantic
import torch

from branchtree.plugins import Condition, Samples, Scores
from branchtree_actions.samples import Trajectories


class OutcomeConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """``measure``: the task's return, or 1 for a success and 0 for none."""

    measure: Literal["return", "success"] = "return"


class OutcomeReward:
    """Takes the actions in the task's environment."""

    modalities: frozenset[str]

    def __init__(self, config: OutcomeConfig) -> None:
        self.config = config

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, media: Samples, conditions: Sequence[Condition]) -> Scores:
        """Score chunk i in scene i; actions that are not finite are not valid. Raises ValueError for other samples."""
        if not isinstance(media, Trajectories) or media.modality not in self.modalities:
            raise ValueError(f"{', '.join(self.modalities)} can be scored, not {media.modality}")
        valid = media.is_finite()
        outcome = Trajectories(media.actions.nan_to_num(0, 0, 0), media.task).run(conditions)
        success = torch.from_numpy(outcome.success).float()
        value = torch.from_numpy(outcome.values).float() if self.config.measure == "return" else success
        return Scores(value, valid, details={"success": success})


class Reach(OutcomeReward):
    """How near the goal a drive of the unicycle ends, and whether it touched the obstacle."""

    modalities = frozenset({"unicycle_actions"})


class Coverage(OutcomeReward):
    """How much of the mark the T covers after a push."""

    modalities = frozenset({"pusht_actions"})
