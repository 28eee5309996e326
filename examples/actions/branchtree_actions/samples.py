"""The kind of sample that the policies make: chunks of actions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from branchtree.plugins import Condition, Media, Samples
from branchtree_actions.pusht import PushT
from branchtree_actions.task import Task
from branchtree_actions.unicycle import Unicycle

TASKS: Mapping[str, Task] = {task.name: task for task in (Unicycle(), PushT())}


@dataclass(frozen=True)
class Trajectories(Samples):
    """Chunks of actions for one task."""

    actions: Tensor  # (B, horizon, 2)
    task: str

    @property
    def modality(self) -> str:
        """A kind for each task, so that a recipe with another task's reward is refused before anything is loaded."""
        return f"{self.task}_actions"

    def show(self, conditions: Sequence[Condition]) -> Media:
        """Draw what each chunk does."""
        task, actions = TASKS[self.task], self.actions.double().cpu().numpy()
        drawn = [task.picture(each.read(task.scene), chunk) for each, chunk in zip(conditions, actions, strict=True)]
        return Media(images=torch.from_numpy(np.stack(drawn)).movedim(-1, 1).float() / 255)
