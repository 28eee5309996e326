"""The ``actions`` model: flow matching from noise to a chunk of actions, given what the policy sees."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from branchtree.plugins import Condition, Conditioning, ModelBase
from branchtree_actions.samples import TASKS, Trajectories
from branchtree_actions.task import Task

FREQUENCIES = 8  # of the embedding of the noise level


class PolicyConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """``path`` is a folder that ``pretrain`` or a run wrote, or none for fresh weights; ``width`` that of a layer."""

    task: Literal["unicycle", "pusht"]
    path: Path | None = None
    width: int = pydantic.Field(default=128, ge=8)


class Network(nn.Module):
    """Three hidden layers on noisy actions (B, horizon, 2), observations (B, size) and noise levels (B,)."""

    def __init__(self, numbers: int, observation: int, width: int) -> None:
        super().__init__()
        sizes = [numbers + observation + 2 * FREQUENCIES, width, width, width]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, numbers))

    def forward(self, actions: Tensor, observation: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity, from actions towards noise, of the actions' shape."""
        angles = sigma[:, None] * math.pi * 2.0 ** torch.arange(-1, FREQUENCIES - 1, device=sigma.device)
        given = torch.cat([actions.flatten(1), observation, angles.sin(), angles.cos()], dim=1)
        velocity: Tensor = self.layers(given.to(next(self.parameters()).dtype))
        return velocity.view_as(actions)


class Policy(ModelBase):
    """Latents are the actions, scaled to about unit size; a condition's metadata are its scene."""

    latent_shape = (Task.horizon, 2)

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.task = TASKS[config.task]

    @property
    def modality(self) -> str:
        """The task's own kind of sample."""
        return f"{self.config.task}_actions"

    def check(self, condition: Condition) -> None:
        """Refuse a condition without a scene, by a DataError."""
        condition.read(self.task.scene)

    def build_denoiser(self) -> Network:
        """A network with random weights."""
        return Network(math.prod(self.latent_shape), self.task.observation_size, self.config.width)

    def encode(self, conditions: Sequence[Condition]) -> Conditioning:
        """What the policy sees of each scene, (P, size)."""
        seen = np.stack([self.task.observe(condition.read(self.task.scene)) for condition in conditions])
        return {"observation": torch.from_numpy(seen).float()}

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The velocity at latents (B, horizon, 2)."""
        velocity: Tensor = (denoiser or self.denoiser)(latents, conditioning["observation"], sigma)
        return velocity.float()

    def decode(self, latents: Tensor) -> Trajectories:
        """Latents as actions in the task's own units."""
        return Trajectories(latents.float() * self.task.action_scale, self.config.task)
