"""VBench's motion smoothness, `vbench_smoothness`: how well each second frame follows from those beside it.

The formula is that of motion_smoothness.py in Vchitect/VBench (arXiv 2311.17982). VBench interpolates with AMT-S, whose
licence (CC BY-NC 4.0) forbids commercial use, so that this library does not hold it: you name the interpolator, which
may be AMT if its licence suits you. The linear blend that comes along is another measure.
Axis letters: B videos, T frames, N pairs of frames, H height, W width.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Protocol

import pydantic
import torch
from torch import Tensor

from branchtree.core.scores import Scores
from branchtree.errors import RewardError
from branchtree.files.paths import PathOrName
from branchtree.plugins import Condition, Media
from branchtree_rewards.shared.reward import Reward
from branchtree_rewards.shared.samples import spans
from branchtree_rewards.shared.scale import ScaleName, transform
from branchtree_rewards.shared.source import cause
from branchtree_rewards.vbench.base import Figures, byte_values, gather_figures, padded, unpadded

BLEND = "blend"
UNIT = 16  # pixels: AMT's sides are multiples of it


class FrameInterpolator(Protocol):
    """Draws the frame that lies in the middle between two."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Return frames (N, 3, H, W) in the middle of those given, float32 on their device.

        The numbers given are in [0, 1]; what is returned is cut to that range. H and W are multiples of 16.
        """


def blend(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean of two frames: whatever moves becomes two faint copies, so that all motion is penalised."""
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


class VBenchSmoothness(Reward[VBenchSmoothnessConfig]):
    """VBench's motion smoothness: 1 where each second frame is the one that an interpolator draws from its neighbours.

        video = 1 - mean over odd t of mean |frame_t - drawn_t| / 255

    in bytes, the drawn ones cut off rather than rounded. A last frame without one after it is left out, and a video of
    fewer than 3 frames is not valid. Details: `difference`, the mean difference in bytes, and with the linear blend
    `blend_not_vbench`, the value once more, under the name that it has to be reported by.
    """

    name = "vbench_smoothness"
    modalities = frozenset({"video"})
    reads_prompt = False

    def __init__(self, config: VBenchSmoothnessConfig) -> None:
        super().__init__(config)
        self._scale = transform(config.scale)
        self._interpolate: FrameInterpolator = blend

    def footprint(self) -> None:
        """Return None: an interpolator does not say what it takes."""

    def load(self, device: torch.device) -> None:
        """Make the interpolator. Raises RewardError if it cannot be imported or made."""
        if self._config.interpolator != BLEND:
            self._interpolate = self._made(device)
        super().load(device)

    def _made(self, device: torch.device) -> FrameInterpolator:
        name = self._config.interpolator
        module, attributes = name.split(":")
        try:
            factory = attrgetter(attributes)(importlib.import_module(module))
            made: FrameInterpolator = factory(device=device, **self._config.options)
        except Exception as error:  # somebody else's code
            raise RewardError(f"cannot make the interpolator '{name}' ({cause(error)})") from error
        if not callable(made):
            raise RewardError(f"the interpolator '{name}' made a {type(made).__name__}, which cannot be called")
        return made

    def _rows_at_once(self) -> int:
        return 1

    def _shape_flaw(self, media: Media) -> str | None:
        frames = media.pixels.shape[1]
        return f"a video of {frames} frames has none between two others" if frames < 3 else None

    def _scores(self, media: Media, conditions: Sequence[Condition]) -> Scores:
        measured = gather_figures([self._figure(video) for video in media.pixels], torch.device("cpu"))
        return measured.scores(self._scale, "the interpolator's frames are not finite")

    def _figure(self, video: Tensor) -> Figures:
        difference = self._difference(byte_values(video))
        value = 1 - difference / 255
        blended = {"blend_not_vbench": value} if self._config.interpolator == BLEND else {}
        return {"value": value, "difference": difference, **blended}

    def _difference(self, frames: Tensor) -> Tensor:
        """Return the mean difference, float64, of odd frames from the drawn ones, of frames (T, 3, H, W) in 0..255.

        Raises:
            RewardError: the interpolator returned something else than frames of their size.
        """
        kept, height, width = padded(frames[::2] / 255, UNIT), frames.shape[-2], frames.shape[-1]
        left_out = frames[1::2][: len(kept) - 1]
        differences = []
        for span in spans(len(left_out), self._config.frames):
            drawn = self._interpolate(kept[:-1][span], kept[1:][span])
            if not isinstance(drawn, Tensor) or drawn.shape != kept[1:][span].shape:
                found = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
                raise RewardError(
                    f"the interpolator '{self._config.interpolator}' returned {found}, not frames of shape "
                    f"{tuple(kept[1:][span].shape)}"
                )
            whole = (unpadded(drawn, height, width, UNIT) * 255).clamp(0, 255).floor()
            differences.append((whole.double() - left_out[span].double()).abs().mean(dim=(1, 2, 3)))
        return torch.cat(differences).mean()
