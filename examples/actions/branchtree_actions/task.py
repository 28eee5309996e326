"""What a task is: scenes to act in, what the policy sees of one, and how a chunk of actions ends there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image

from branchtree.errors import DataError
from branchtree.plugins import Condition

Array = NDArray[np.float64]
Point = Annotated[tuple[float, float], pydantic.Field(description="x and y")]
Pose = Annotated[tuple[float, float, float], pydantic.Field(description="x, y and an angle")]


class Scene(pydantic.BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Where a chunk of actions begins; a prompt file's keys beside the prompt."""


@dataclass(frozen=True)
class Outcome:
    """What chunks of actions led to, in B scenes."""

    paths: Array  # (B, horizon + 1, 2), where the agent was
    values: Array  # (B,), the return: higher is better
    success: NDArray[np.bool_]  # (B,)


class Task(ABC):
    """An environment whose chunks are (horizon, 2) actions.

    The policy works with numbers of about unit size: an observation, and actions that are shifted by ``action_offset``
    and divided by ``action_scale``.
    """

    name: ClassVar[str]
    prompt: ClassVar[str]
    scene: ClassVar[type[Scene]]
    horizon: ClassVar[int]
    observation_size: ClassVar[int]
    action_offset: ClassVar[float] = 0.0
    action_scale: ClassVar[float] = 1.0

    def read(self, condition: Condition) -> Any:
        """Return a condition's scene. Raises DataError, naming file and line, for metadata that are none."""
        try:
            return self.scene.model_validate(dict(condition.metadata))
        except pydantic.ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
            keys = ", ".join(self.scene.model_fields)
            raise DataError(f"{condition}: no scene of {self.name}, which has the keys {keys}: {wrong}") from error

    @abstractmethod
    def draw_scene(self, rng: np.random.Generator) -> Any:
        """Return a random scene."""

    @abstractmethod
    def observe(self, scene: Any) -> Array:
        """Return what the policy sees, (observation_size,)."""

    @abstractmethod
    def demonstrate(self, scene: Any, rng: np.random.Generator) -> Array:
        """Return a mediocre chunk of actions (horizon, 2) by a script."""

    @abstractmethod
    def run(self, scenes: Sequence[Any], actions: Array) -> Outcome:
        """Take the actions (B, horizon, 2), each chunk in its scene."""

    @abstractmethod
    def picture(self, scene: Any, actions: Array) -> Image.Image:
        """Draw a scene and what a chunk of actions (horizon, 2) does in it."""
