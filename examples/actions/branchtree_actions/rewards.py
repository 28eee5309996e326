"""The rewards ``reach`` and ``pusht``: what comes of a chunk of actions."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import pydantic
import torch

from branchtree.errors import RewardError
from branchtree.plugins import Condition, Samples, Scores
from branchtree_actions.samples import TASKS, Trajectories


class OutcomeConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """``measure``: the task's return, or 1 for a success and 0 for none."""

    measure: Literal["return", "success"] = "return"


class OutcomeReward:
    """Takes the actions in a task's environment."""

    def __init__(self, task: str, config: OutcomeConfig) -> None:
        self.config, self.task = config, TASKS[task]
        self.modalities = frozenset({f"{task}_actions"})

    def load(self, device: torch.device) -> None:
        """Load nothing. Raises RewardError if the task's environment is not installed."""
        if find_spec(self.task.needs.replace("-", "_")) is None:
            raise RewardError(f"{self.task.needs} is not installed; install it by: pip install {self.task.needs}")

    def score(self, media: Samples, conditions: Sequence[Condition]) -> Scores:
        """Score chunk i in scene i; those that are not finite are not valid. Raises ValueError if they do not match."""
        if not isinstance(media, Trajectories) or media.modality not in self.modalities:
            raise ValueError(f"{', '.join(self.modalities)} can be scored, not {media.modality}")
        if len(conditions) != len(media):
            raise ValueError(f"{len(media)} chunks of actions cannot be taken in {len(conditions)} scenes")
        actions = media.actions.nan_to_num(0, 0, 0).double().cpu().numpy()
        outcome = self.task.run([condition.read(self.task.scene) for condition in conditions], actions)
        success = torch.from_numpy(outcome.success).float()
        value = torch.from_numpy(outcome.values).float() if self.config.measure == "return" else success
        return Scores(value, media.is_finite(), details={"success": success})
