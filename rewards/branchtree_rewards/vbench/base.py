"""Common ground of the rewards of VBench's dimensions: settings, frames as VBench shows them, and one figure a video.

Frames are float32 with the values 0 to 255 of their bytes, as VBench reads them from an MP4 file, and are resized
without antialiasing. Axis letters: T frames, H height, W width, S side of a square.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional

from branchtree.plugins import Condition, Media
from branchtree_rewards.shared.pixels import normalised, to_rgb, to_uint8
from branchtree_rewards.shared.reward import Measured, ModelConfig, ModelReward, ModelRewardConfig


class VBenchConfig(ModelRewardConfig, frozen=True):
    """Settings of a reward that measures a dimension of VBench by a model.

    Attributes:
        batch: Videos that are on the device at a time; each is measured alone.
        frames: Frames sent through the model at a time.
    """

    batch: int = pydantic.Field(default=1, ge=1, le=10_000)
    frames: int = pydantic.Field(default=32, ge=1, le=10_000)


Figures = Mapping[str, Tensor | float]
"""The score of one video, under "value", and its details."""


def gather_figures(figures: Sequence[Figures], device: torch.device) -> Measured:
    """Return the figures of B videos, which have the same names."""
    columns = {
        name: torch.tensor([float(video[name]) for video in figures], dtype=torch.float32, device=device)
        for name in figures[0]
    }
    return Measured(columns.pop("value"), columns)


class VBenchReward(ModelReward[ModelConfig]):
    """A dimension of VBench that a model measures, one video after the other, whatever the prompts."""

    modalities = frozenset({"video"})
    reads_prompt = False

    @abstractmethod
    def _figure(self, network: nn.Module, frames: Tensor, fps: float | None) -> Figures:
        """Measure one video: frames (T, 3, H, W), floats from 0 to 255, that play at ``fps``."""

    def _measure(self, network: nn.Module, media: Media, conditions: Sequence[Condition]) -> Measured:
        figures = [self._figure(network, byte_values(video), media.fps) for video in media.pixels]
        return gather_figures(figures, media.pixels.device)


def byte_values(video: Tensor) -> Tensor:
    """Return a video (T, C, H, W) in [0, 1] as float (T, 3, H, W) with whole values from 0 to 255."""
    return to_uint8(to_rgb(video)).float()


def clip_input(frames: Tensor, size: int) -> Tensor:
    """Return frames (T, 3, H, W) from 0 to 255 as CLIP takes them, (T, 3, S, S).

    The shorter side is resized to ``size``, bicubic, and the middle cut out. As the numbers are floats nothing holds
    them to 0 and 255 there: at sharp edges they overshoot, and VBench leaves that as it is.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    resized = vision.resize(frames, size, InterpolationMode.BICUBIC, antialias=False)
    return normalised(vision.center_crop(resized, size) / 255)


def longer_side(frames: Tensor, longest: int) -> Tensor:
    """Shrink frames (T, 3, H, W), bilinear, until no side is longer than ``longest`` pixels; smaller ones pass."""
    height, width = frames.shape[-2:]
    if max(height, width) <= longest:
        return frames
    scale = float(longest) / max(height, width)
    new = (int(scale * height), int(scale * width))
    return functional.interpolate(frames, new, mode="bilinear", align_corners=False, antialias=False)


def margins(height: int, width: int, unit: int) -> tuple[int, int, int, int]:
    """Return what to add left, right, above and below until sides are multiples of ``unit``; an odd one comes last."""
    across, down = -width % unit, -height % unit
    return across // 2, across - across // 2, down // 2, down - down // 2


def padded(frames: Tensor, unit: int) -> Tensor:
    """Repeat the edges of frames (T, 3, H, W) until both sides are multiples of ``unit``."""
    return functional.pad(frames, margins(frames.shape[-2], frames.shape[-1], unit), mode="replicate")


def unpadded(frames: Tensor, height: int, width: int, unit: int) -> Tensor:
    """Return frames (T, 3, height, width) as they were before `padded`."""
    left, _, top, _ = margins(height, width, unit)
    return frames[..., top : top + height, left : left + width]
