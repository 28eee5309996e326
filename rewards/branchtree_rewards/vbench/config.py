"""What the rewards of VBench's dimensions share: settings, and the way from videos to one figure each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pydantic
import torch
from torch import Tensor, nn

from branchtree.plugins import Condition, Media
from branchtree_rewards.shared.model_reward import Measured, ModelReward, ModelRewardConfig
from branchtree_rewards.vbench.frames import byte_values


class VBenchConfig(ModelRewardConfig, frozen=True):
    """Settings of a reward that measures a dimension of VBench by a model.

    Attributes:
        batch: Videos that are on the device at a time; each is measured alone.
        frames: Frames sent through the model at a time.
    """

    batch: int = pydantic.Field(default=1, ge=1, le=10_000)
    frames: int = pydantic.Field(default=32, ge=1, le=10_000)


@dataclass(frozen=True)
class VideoFigure:
    """What is said of one video: a number and details."""

    value: Tensor | float
    details: Mapping[str, Tensor | float] = field(default_factory=dict)


def gather_figures(figures: Sequence[VideoFigure], device: torch.device) -> Measured:
    """The figures of B videos. Their details have the same names."""

    def column(values: Sequence[Tensor | float]) -> Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float32, device=device)

    return Measured(
        column([figure.value for figure in figures]),
        {name: column([figure.details[name] for figure in figures]) for name in figures[0].details},
    )


Config = TypeVar("Config", bound=ModelRewardConfig)


class VBenchReward(ModelReward[Config]):
    """A dimension of VBench that a model measures, one video after the other; the prompts take no part."""

    modalities = frozenset({"video"})
    reads_prompt = False

    @abstractmethod
    def _figure(self, network: nn.Module, frames: Tensor, fps: float | None) -> VideoFigure:
        """Measure one video: frames (T, 3, H, W), floats from 0 to 255, that play at ``fps``."""

    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        figures = [self._figure(network, byte_values(video), media.fps) for video in media.pixels]
        return gather_figures(figures, media.pixels.device)


def spans(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``length``."""
    return (slice(start, start + size) for start in range(0, length, size))
