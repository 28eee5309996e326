"""What answers UnifiedReward's questions: a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from branchtree.plugins import RewardFootprint
from branchtree_rewards.unifiedreward.templates import NoScore, Spoken

if TYPE_CHECKING:
    from PIL.Image import Image


class Backend(Protocol):
    """Answers questions about pictures, one each. Nothing is loaded or asked before ``load``."""

    @property
    def name(self) -> str:
        """What the model is called, as far as it is known."""

    def footprint(self) -> RewardFootprint | None:
        """The memory of weights in this process; None if it is not known."""

    def load(self, device: torch.device) -> None:
        """Make ready to answer. Raises RewardError that says what is missing and what to do."""

    def prompt_flaw(self, prompt: str, asked: str) -> str | None:
        """Say why the model cannot be asked ``asked`` about a prompt, if it cannot be."""

    def answers(self, pictures: Sequence[Image], questions: Sequence[str]) -> list[Spoken | NoScore]:
        """An answer to each question about the picture at the same place, or why there is none."""

    def release(self) -> None:
        """Leave the device until the next question, if asked to."""

    def identity(self) -> str:
        """What is known of the weights that answer."""
