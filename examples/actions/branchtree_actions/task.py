"""What a task is: scenes to act in, what the policy sees of one, and how a chunk of actions ends there."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pydantic
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]  # (height, width, 3)
Point = tuple[float, float]  # x and y
Pose = tuple[float, float, float]  # x, y and an angle


class Scene(pydantic.BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Where a chunk of actions begins; a prompt file's keys beside the prompt."""


@dataclass(frozen=True)
class Outcome:
    """What chunks of actions led to, in B scenes."""

    paths: Array  # (B, horizon + 1, 2), where the agent was
    values: Array  # (B,), the return: higher is better
    success: NDArray[np.bool_]  # (B,)


def rotation(angle: float) -> Array:
    """Return the matrix that turns a vector by an angle."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


class Task(ABC):
    """An environment whose chunks are (horizon, 2) actions."""

    name: ClassVar[str]
    prompt: ClassVar[str]
    scene: ClassVar[type[Scene]]
    horizon: ClassVar[int] = 16
    observation_size: ClassVar[int]
    needs: ClassVar[str] = "numpy"  # the package that has its environment
    action_scale: ClassVar[float] = 1.0  # the policy's actions are divided by it, so that they are of about unit size

    @abstractmethod
    def draw_scene(self, rng: np.random.Generator) -> Any:
        """Return a random scene."""

    @abstractmethod
    def observe(self, scene: Any) -> Array:
        """Return what the policy sees, (observation_size,), of about unit size."""

    @abstractmethod
    def demonstrate(self, scene: Any, rng: np.random.Generator) -> Array:
        """Return a mediocre chunk of actions (horizon, 2) by a script."""

    @abstractmethod
    def run(self, scenes: Sequence[Any], actions: Array) -> Outcome:
        """Take the actions (B, horizon, 2), each chunk in its scene."""

    @abstractmethod
    def picture(self, scene: Any, actions: Array) -> Pixels:
        """Draw a scene and what a chunk of actions (horizon, 2) does in it."""
