"""VBench's motion smoothness, `vbench_smoothness`: how well each second frame follows from those beside it.

The formula is that of motion_smoothness.py in Vchitect/VBench (arXiv 2311.17982). VBench interpolates with AMT-S, whose
licence (CC BY-NC 4.0) forbids commercial use, so that it is not part of this library: you name the interpolator, which
may be AMT if its licence suits you. The linear blend that comes along is another measure.
Axis letters: B videos, T frames, N pairs of frames, H height, W width.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Protocol

import pydantic
import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media
from branchtree_rewards.shared.samples import check_batch, find_flaws, score_rest
from branchtree_rewards.shared.scale import ScaleName, transform
from branchtree_rewards.vbench.config import VideoFigure, gather_figures, spans
from branchtree_rewards.vbench.frames import byte_values, padded, unpadded

BLEND = "blend"
UNIT = 16  # pixels: AMT's sides are multiples of it


class FrameInterpolator(Protocol):
    """Draws the frame that lies in the middle between two."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Frames (N, 3, H, W) in the middle of those given, float32 on their device.

        The numbers given are in [0, 1]; what is returned is cut to that range. H and W are multiples of 16.
        """


def blend(first: Tensor, second: Tensor) -> Tensor:
    """The mean of two frames. Whatever moves becomes two faint copies, so it penalises all motion."""
    return (first + second) / 2


def _known(name: str) -> str:
    if name != BLEND and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        raise ValueError(
            f"'{name}' names no interpolator; write package.module:factory for one that you installed, or '{BLEND}' "
            "for a linear blend, which is not VBench's measure"
        )
    return name


class VBenchSmoothnessConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of the `vbench_smoothness` reward.

    Attributes:
        interpolator: "package.module:factory", Python code that you installed and that is run: called with the keyword
            `device` and the options below, the factory returns a `FrameInterpolator`. VBench's is AMT-S, which this
            library does not bring: its licence is CC BY-NC 4.0. Or "blend", the mean of two frames, whose figures are
            not VBench's.
        options: Keywords for the factory, such as the path of its weights.
        scale: The transform from the measure to the trained value, as for rewards with published weights.
        frames: Pairs of frames sent through the interpolator at a time.
    """

    interpolator: Annotated[str, pydantic.AfterValidator(_known)]
    options: Mapping[str, PathOrName | int | float | bool] = pydantic.Field(default_factory=dict)
    scale: ScaleName = "raw"
    frames: int = pydantic.Field(default=1, ge=1, le=10_000)


class VBenchSmoothness:
    """VBench's motion smoothness: 1 where each second frame is the one that an interpolator draws from its neighbours.

        video = 1 - mean over odd t of mean |frame_t - drawn_t| / 255

    in bytes, the drawn ones cut off rather than rounded. A last frame without one after it is left out. Details:
    `difference`, the mean difference in bytes, and with the linear blend `blend_not_vbench`, the value once more, under
    the name that it has to be reported by.
    """

    modalities: frozenset[str] = frozenset({"video"})
    reads_prompt = False

    def __init__(self, config: VBenchSmoothnessConfig) -> None:
        self._config = config
        self._scale = transform(config.scale)
        self._interpolator: FrameInterpolator | None = None
        self._device = torch.device("cpu")

    def load(self, device: torch.device) -> None:
        """Make the interpolator. Raises RewardError if it cannot be imported or made."""
        self._device = device
        self._interpolator = blend if self._config.interpolator == BLEND else self._made(device)

    def _made(self, device: torch.device) -> FrameInterpolator:
        name = self._config.interpolator
        module, attributes = name.split(":")
        try:
            factory = importlib.import_module(module)
            for attribute in attributes.split("."):
                factory = getattr(factory, attribute)
            made: FrameInterpolator = factory(device=device, **self._config.options)  # type: ignore[operator]
        except Exception as error:  # somebody else's code
            raise RewardError(f"cannot make the interpolator '{name}' ({type(error).__name__}: {error})") from error
        if not callable(made):
            raise RewardError(f"the interpolator '{name}' made a {type(made).__name__}, which cannot be called")
        return made

    @torch.no_grad()
    def score(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        """Score video i; the conditions take no part.

        Args:
            media: Videos (B, T, C, H, W), float in [0, 1]. One of fewer than 3 frames, or that is not finite, is not
                valid.
            conditions: B conditions.

        Returns:
            Scores (B,) on the CPU: `values` after the scale, `raw` before it.

        Raises:
            RuntimeError: `load` was not called.
            ValueError: the media are no videos, or there are not B conditions.
            RewardError: the interpolator returned something else than frames of that size.
        """
        if self._interpolator is None:
            raise RuntimeError("this reward was not loaded: call load(device) first")
        check_batch(media, conditions, self.modalities)
        interpolate = self._interpolator
        flaws = find_flaws(media, conditions, _too_short)
        return score_rest(media, conditions, flaws, lambda good, _: self._scores(interpolate, good.pixels))

    def _scores(self, interpolate: FrameInterpolator, videos: Tensor) -> Scores:
        measured = gather_figures([self._figure(interpolate, video) for video in videos], torch.device("cpu"))
        valid = measured.raw.isfinite()
        reasons = dict.fromkeys((~valid).nonzero().flatten().tolist(), "the interpolator's frames are not finite")
        return Scores(self._scale(measured.raw), valid, measured.raw, measured.details, reasons)

    def _figure(self, interpolate: FrameInterpolator, video: Tensor) -> VideoFigure:
        difference = self._difference(interpolate, byte_values(video.to(self._device, torch.float32)))
        value = 1 - difference / 255
        blended = {"blend_not_vbench": value} if self._config.interpolator == BLEND else {}
        return VideoFigure(value, {"difference": difference, **blended})

    def _difference(self, interpolate: FrameInterpolator, frames: Tensor) -> Tensor:
        """The mean difference of odd frames from the drawn ones, of frames (T, 3, H, W) from 0 to 255; float64."""
        kept, height, width = padded(frames[::2] / 255, UNIT), frames.shape[-2], frames.shape[-1]
        left_out = frames[1::2][: len(kept) - 1]
        parts = []
        for span in spans(len(left_out), self._config.frames):
            drawn = interpolate(kept[:-1][span], kept[1:][span])
            if not isinstance(drawn, Tensor) or drawn.shape != kept[1:][span].shape:
                found = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
                raise RewardError(
                    f"the interpolator '{self._config.interpolator}' returned {found}, not frames of shape "
                    f"{tuple(kept[1:][span].shape)}"
                )
            whole = (unpadded(drawn, height, width, UNIT) * 255).clamp(0, 255).floor()
            parts.append((whole.double() - left_out[span].double()).abs().mean(dim=(1, 2, 3)))
        return torch.cat(parts).mean()


def _too_short(media: Media) -> str | None:
    frames = media.pixels.shape[1]
    return f"a video of {frames} frames has none between two others" if frames < 3 else None
